// How a math warpgroup turns stages into totals: wait, wgmma, promote.
#pragma once

namespace dg {

// What a math warpgroup knows of a tile, from the operand warp.
struct MathTile {
  int m;
  int n;
  int rows;  // see Tile
  TileKind kind;
};

// One math warpgroup's walk through the stages.
//
// What costs time here is the gap between a wgmma's end and the next one's start. So all that the
// next one needs, its addresses and a look at whether its stage is full, and all that the promotion
// multiplies with, is made while the last one runs; and where registers allow, the promotion itself
// runs under the next wgmma.
class Mainloop {
 public:
  // `row`, `column`: the warpgroup's corner in the tile; `warp`: rank in the warpgroup.
  __device__ Mainloop(const Smem& smem, int row, int column, int warp)
      : smem_(smem),
        k_blocks_(KRange().count()),
        a_(wgmma_descriptor_low(smem.a(0) + row * kBlockK)),
        b_(wgmma_descriptor_low(smem.b(0) + column * kBlockK)),
        sfa_(smem.sfa(0) + (row + warp * 16 + static_cast<int>(threadIdx.x) % 32 / 4) * 4),
        column_(column) {
    look_ahead();
  }

  // Waits for the next tile's first stage. Then a tile that multiplies is to be run, one of zeros
  // to be skipped.
  __device__ MathTile next_tile() {
    acquire();
    const int4 tile = ld_shared_v4_s32(smem_.tile(slot_.next()));
    n_offset_ = (tile.y + column_) % 128;
    // So that ptxas knows that all lanes take the same loop: a wgmma may not be where they diverge.
    if constexpr (kLoops > 1) n_offset_ = __shfl_sync(0xffffffff, n_offset_, 0);
    sfb_offset_ = (tile.y % 128 + column_) / 128 * 4;
    return {tile.x, tile.y, tile.z, static_cast<TileKind>(tile.w)};
  }

  // Accumulates the tile into `total`, which is zero.
  __device__ void run(float (&total)[kWaves][kAccumulators]) {
    if constexpr (kLoops > 1) {
      run_at<0>(total);
    } else if constexpr (!kLayout.overlaps_promotion()) {
      run_alternating<kAnyOffset>(total);
    } else if constexpr (kWaves == 1) {
      run_overlapped(total[0]);
    } else {
      run_overlapped(total[0], total[kWaves - 1]);
    }
  }

  // What `run` waits for, without what it computes.
  __device__ void stream() {
    for (int left = k_blocks_;;) {
      look_ahead();
      release(stage_);
      if (--left == 0) break;
      acquire();
    }
  }

  // A tile without k-blocks has one stage.
  __device__ void skip() {
    look_ahead();
    release(stage_);
  }

 private:
  static constexpr int kAnyOffset = -1;

  static constexpr int kLoops = kLayout.loops(kKBlocks / config::kClusterK);

  // The loop for this tile's offset.
  template <int kOffset>
  __device__ __forceinline__ void run_at(float (&total)[kWaves][kAccumulators]) {
    if constexpr (kOffset + kScaleGranule < 128) {
      if (n_offset_ != kOffset) {
        run_at<kOffset + kScaleGranule>(total);
        return;
      }
    }
    run_alternating<kOffset>(total);
  }

  // One accumulator: the tensor cores work for the other warpgroup while this one promotes. They
  // idle where the way from one wgmma of a warpgroup to its next takes longer than the wgmmas of
  // both: 512 cycles with 64x128, of which it takes 256 itself, 60 to begin and to be seen to end,
  // and most of the rest for the FFMAs, which is why their hints matter (csrc/jit/interleave.h).
  // With one wave, scales are read a k-block ahead, if they are there; with two, that gained
  // nothing. kOffset is that of the first column in its block of 128, if it is known.
  template <int kOffset>
  __device__ __forceinline__ void run_alternating(float (&total)[kWaves][kAccumulators]) {
    constexpr bool kReadsAhead = kWaves == 1;
    if constexpr (kReadsAhead) read_scales(0);
    for (int left = k_blocks_;;) {
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
        float partial[kAccumulators];
        if constexpr (!kReadsAhead) read_scales(wave);
        issue(partial, wave);
        combine_scales();
        if (wave == kWaves - 1) {
          look_ahead();
          if constexpr (kReadsAhead) read_next_scales(left > 1 && next_full_);
        }
        drain(partial);
        if (wave == kWaves - 1) release(stage_);
        add(total[wave], partial, kOffset == kAnyOffset ? n_offset_ : kOffset);
      }
      if (__builtin_expect(--left == 0, false)) break;
      acquire();
      if constexpr (kReadsAhead) {
        if (__builtin_expect(!next_full_, false)) read_scales(0);
      }
    }
  }

  // Two accumulators, for even and odd k-blocks.
  __device__ void run_overlapped(float (&total)[kAccumulators]) {
    float even[kAccumulators], odd[kAccumulators];
    read_scales(0);
    issue(even, 0);
    combine_scales();
    int left = opaque(k_blocks_ - 1);
    for (; left >= 2; left -= 2) {
      queue(total, even, odd);
      queue(total, odd, even);
    }
    if (left == 1) {
      queue(total, even, odd);
      last(total, odd);
    } else {
      last(total, even);
    }
  }

  // Two accumulators, for the first and second wave of every k-block.
  __device__ void run_overlapped(float (&total_0)[kAccumulators], float (&total_1)[kAccumulators]) {
    float partial_0[kAccumulators], partial_1[kAccumulators];
    read_scales(0);
    issue(partial_0, 0);
    combine_scales();
    for (int left = k_blocks_ - 1; left > 0; --left) {
      second_wave(total_0, partial_0, partial_1);
      step(total_1, partial_1, partial_0);
    }
    second_wave(total_0, partial_0, partial_1);
    last(total_1, partial_1);
  }

  // A number that ptxas does not know, so that it neither peels nor rotates the loop that counts it
  // down: it would copy accumulators that a wgmma is still writing, and serialise all of them.
  __device__ static int opaque(int count) {
    asm volatile("" : "+r"(count));
    return count;
  }

  // Starts the next k-block in `next`, behind the wgmma that still makes `done`, so that the tensor
  // cores go from one to the other at once; then promotes `done`.
  __device__ void queue(float (&total)[kAccumulators], float (&done)[kAccumulators],
                        float (&next)[kAccumulators]) {
    look_ahead();
    const int stage = stage_;
    acquire();
    read_scales(0);
    issue(next, 0);
    drain<1>(done);
    release(stage);
    add(total, done, n_offset_);
    combine_scales();
  }

  // Finishes `done`, starts the next k-block in `next`, and promotes while that one runs.
  __device__ void step(float (&total)[kAccumulators], float (&done)[kAccumulators],
                       float (&next)[kAccumulators]) {
    look_ahead();
    drain(done);
    release(stage_);
    acquire();
    read_scales(0);
    issue(next, 0);
    add(total, done, n_offset_);
    combine_scales();
  }

  // The same within a k-block.
  __device__ void second_wave(float (&total)[kAccumulators], float (&done)[kAccumulators],
                              float (&next)[kAccumulators]) {
    drain(done);
    read_scales(1);
    issue(next, 1);
    add(total, done, n_offset_);
    combine_scales();
  }

  __device__ void last(float (&total)[kAccumulators], float (&done)[kAccumulators]) {
    look_ahead();
    drain(done);
    release(stage_);
    add(total, done, n_offset_);
  }

  // Prepares for the next stage, without waiting for it. Once per stage, while a wgmma runs.
  __device__ void look_ahead() {
    next_stage_ = ring_.stage();
    next_parity_ = ring_.parity();
    next_a_ = a_ + next_stage_ * (kLayout.a_bytes() / 16);
    next_b_ = b_ + next_stage_ * (kLayout.b_bytes() / 16);
    next_sfa_ = sfa_ + next_stage_ * kLayout.sfa_bytes();
    next_sfb_ = smem_.sfb(next_stage_);
    next_full_ = mbarrier_test_wait(smem_.full(next_stage_), next_parity_);
    ring_.advance();
    // Now, not when they are needed.
    asm volatile("" : "+r"(next_a_), "+r"(next_b_), "+r"(next_sfa_), "+r"(next_sfb_));
  }

  // Waits until the stage that was looked at is in shared memory.
  __device__ void acquire() {
    stage_ = next_stage_;
    stage_a_ = next_a_;
    stage_b_ = next_b_;
    stage_sfa_ = next_sfa_;
    stage_sfb_ = next_sfb_;
    if (__builtin_expect(!next_full_, false)) {
      mbarrier_wait(smem_.full(next_stage_), next_parity_);
    }
  }

  // Starts partial = A * B for one wave of the acquired k-block.
  __device__ void issue(float (&partial)[kAccumulators], int wave) {
    const uint32_t a = stage_a_ + wave * kWgmmaM * kBlockK / 16;
    const uint32_t b = stage_b_;
    pin(partial);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK; k += 32) {
      wgmma(partial, wgmma_descriptor(a + k / 16), wgmma_descriptor(b + k / 16), k != 0);
    }
    wgmma_commit_group();
  }

  // Reads the scales of the wave that is issued next. Ahead of it, because ptxas schedules what
  // uses them between the wgmmas and would make the second one wait for shared memory.
  __device__ void read_scales(int wave) {
    const uint32_t sfa = stage_sfa_ + wave * kWgmmaM * 4;
    row_0_ = ld_shared(sfa);
    row_1_ = ld_shared(sfa + 8 * 4);
    if (wave > 0) return;
#pragma unroll
    for (int i = 0; i < kScaleBlocks; ++i) {
      columns_[i] = ld_shared(stage_sfb_ + sfb_offset_ + 4 * i);
    }
  }

  // Those of the next stage's first wave, if it `is_full`.
  __device__ void read_next_scales(bool is_full) {
    ld_shared_if(is_full, row_0_, next_sfa_);
    ld_shared_if(is_full, row_1_, next_sfa_ + 8 * 4);
#pragma unroll
    for (int i = 0; i < kScaleBlocks; ++i) {
      ld_shared_if(is_full, columns_[i], next_sfb_ + sfb_offset_ + 4 * i);
    }
  }

  // Makes them what the next promotion multiplies with, once the last one is over.
  __device__ void combine_scales() {
#pragma unroll
    for (int i = 0; i < kScaleBlocks; ++i) {
      scales_.row_0[i] = row_0_ * columns_[i];
      scales_.row_1[i] = row_1_ * columns_[i];
      asm volatile("" : "+f"(scales_.row_0[i]), "+f"(scales_.row_1[i]));  // under the wgmma
    }
  }

  // Waits for the wgmma that makes `partial`; kLater others were issued after it.
  template <int kLater = 0>
  __device__ void drain(float (&partial)[kAccumulators]) {
    wgmma_wait_group<kLater>();
    pin(partial);
  }

  // Gives a stage back to the producers that write to it; whole warps.
  __device__ void release(int stage) const {
    constexpr bool kEveryLane = config::kArrivalsPerWarp == 32;
    const uint32_t empty = smem_.empty(stage);
    const int lane = threadIdx.x % 32;
    if constexpr (!kEveryLane) __syncwarp();  // one lane arrives for what all have read
    if constexpr (kMulticast == 1) {
      if (kEveryLane || lane == 0) mbarrier_arrive(empty);
    } else if constexpr (kEveryLane) {
      for (int rank = 0; rank < kMulticast; ++rank) mbarrier_arrive_remote(mapa(empty, rank));
    } else {
      if (lane < kMulticast) mbarrier_arrive_remote(mapa(empty, lane));
    }
  }

  __device__ __forceinline__ void add(float (&total)[kAccumulators],
                                      const float (&partial)[kAccumulators], int n_offset) {
    promote(total, partial, scales_, n_offset);
    // NOTE: without this pin the compiler may sink the additions below the next wgmma, and ptxas
    // then serialises all of them (C7514).
    pin(total);
  }

  const Smem smem_;
  const int k_blocks_;  // of every tile that multiplies
  RingPosition ring_;   // of the stage to look at next
  TileSlot slot_;
  const uint32_t a_;  // this warpgroup's rows and columns in stage 0, as descriptors' low words
  const uint32_t b_;
  const uint32_t sfa_;  // this thread's first row scale in stage 0
  const int column_;
  // Of the tile.
  int sfb_offset_ = 0;  // bytes to the scale of the warpgroup's first column
  int n_offset_ = 0;    // first column in its block of 128
  // Of the acquired stage: its number, descriptors of A and B, and the scales' addresses.
  int stage_ = 0;
  uint32_t stage_a_ = 0;
  uint32_t stage_b_ = 0;
  uint32_t stage_sfa_ = 0;
  uint32_t stage_sfb_ = 0;
  // Of the one after it.
  int next_stage_ = 0;
  uint32_t next_parity_ = 0;
  uint32_t next_a_ = 0;
  uint32_t next_b_ = 0;
  uint32_t next_sfa_ = 0;
  uint32_t next_sfb_ = 0;
  bool next_full_ = false;
  // Of the wave issued last or, read ahead, of the next one: SFA of this thread's two rows, SFB of
  // the columns' blocks.
  float row_0_ = 0;
  float row_1_ = 0;
  float columns_[kScaleBlocks] = {};
  Scales scales_ = {};  // of the wave to be promoted next
};

}  // namespace dg
