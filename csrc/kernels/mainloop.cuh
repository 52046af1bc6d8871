// How a math warpgroup turns stages into totals: wait, wgmma, promote.
#pragma once

namespace dg {

// One math warpgroup's walk through the k-blocks of its tiles.
//
// What costs time here is the gap between a wgmma's end and the next one's start. So what the next
// one needs, a full stage and its addresses, is there before the last one is waited for, and where
// registers allow, the promotion runs under the next wgmma.
class Mainloop {
 public:
  // `row`, `column`: the warpgroup's corner in the tile; `warp`: rank in the warpgroup.
  __device__ Mainloop(const Smem& smem, const float* sfb, int m, int row, int column, int warp)
      : smem_(smem),
        range_(m),
        scales_b_(sfb),
        a_(wgmma_descriptor(smem.a(0) + row * kBlockK)),
        b_(wgmma_descriptor(smem.b(0) + column * kBlockK)),
        sfa_(smem.sfa(0) + (row + warp * 16 + static_cast<int>(threadIdx.x) % 32 / 4) * 4),
        column_(column) {}

  // Loads the first scales of a tile ahead of time.
  __device__ void prefetch(const Tile& tile) {
    scales_b_.prefetch(range_, tile.n + column_, 0, range_.start(tile), tile.valid);
  }

  // Accumulates a tile into `total`, which is zero.
  __device__ void run(const Tile& tile, const Tile& next_tile,
                      float (&total)[kWaves][kAccumulators]) {
    tile_n_ = tile.n + column_;
    next_tile_ = next_tile;
    start_ = range_.start(tile);
    acquired_ = 0;
    acquire();
    if constexpr (!kLayout.overlaps_promotion()) {
      run_alternating(total);
    } else if constexpr (kWaves == 1) {
      run_overlapped(total[0]);
    } else {
      run_overlapped(total[0], total[kWaves - 1]);
    }
  }

 private:
  // What a wave's partial sums are multiplied with.
  struct Scales {
    float row_0;  // of this thread's row r
    float row_1;  // of row r + 8
    float column[ScalesB::kScaleBlocks];
  };

  // One accumulator: the tensor cores work for the other warpgroup while this one promotes.
  __device__ void run_alternating(float (&total)[kWaves][kAccumulators]) {
    bool more = true;
    while (more) {
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
        float partial[kAccumulators];
        issue(partial, wave);
        load_scales(wave);
        const int stage = stage_;
        if (wave == kWaves - 1) {
          more = acquired_ < range_.count();
          if (more) acquire();
        }
        drain(partial);
        if (wave == kWaves - 1) release(stage);
        add(total[wave], partial);
      }
    }
  }

  // Two accumulators, for even and odd k-blocks.
  __device__ void run_overlapped(float (&total)[kAccumulators]) {
    float even[kAccumulators], odd[kAccumulators];
    issue(even, 0);
    load_scales(0);
    while (acquired_ + 1 < range_.count()) {
      step(total, even, odd);
      step(total, odd, even);
    }
    if (acquired_ < range_.count()) {
      step(total, even, odd);
      last(total, odd);
    } else {
      last(total, even);
    }
  }

  // Two accumulators, for the first and second wave of every k-block.
  __device__ void run_overlapped(float (&total_0)[kAccumulators], float (&total_1)[kAccumulators]) {
    float partial_0[kAccumulators], partial_1[kAccumulators];
    issue(partial_0, 0);
    load_scales(0);
    while (acquired_ < range_.count()) {
      second_wave(total_0, partial_0, partial_1);
      step(total_1, partial_1, partial_0);
    }
    second_wave(total_0, partial_0, partial_1);
    last(total_1, partial_1);
  }

  // Finishes `done`, starts the next k-block in `next`, and promotes while that one runs.
  __device__ void step(float (&total)[kAccumulators], float (&done)[kAccumulators],
                       float (&next)[kAccumulators]) {
    const int stage = stage_;
    acquire();
    drain(done);
    release(stage);
    issue(next, 0);
    add(total, done);
    load_scales(0);
  }

  // The same within a k-block.
  __device__ void second_wave(float (&total)[kAccumulators], float (&done)[kAccumulators],
                              float (&next)[kAccumulators]) {
    drain(done);
    issue(next, 1);
    add(total, done);
    load_scales(1);
  }

  __device__ void last(float (&total)[kAccumulators], float (&done)[kAccumulators]) {
    drain(done);
    release(stage_);
    add(total, done);
  }

  // Waits until the next k-block is in shared memory.
  __device__ void acquire() {
    stage_ = ring_.stage();
    mbarrier_wait(smem_.full(stage_), ring_.parity());
    ring_.advance();
    ++acquired_;
  }

  // Starts partial = A * B for one wave of the acquired k-block.
  __device__ void issue(float (&partial)[kAccumulators], int wave) {
    const uint64_t a = a_ + (stage_ * kLayout.a_bytes() + wave * kWgmmaM * kBlockK) / 16;
    const uint64_t b = b_ + stage_ * kLayout.b_bytes() / 16;
    pin(partial);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK; k += 32) wgmma(partial, a + k / 16, b + k / 16, k != 0);
    wgmma_commit_group();
  }

  // Reads the scales of the wave issued last, once those of the one before it are used up: the
  // registers for two sets are what the second accumulator takes.
  __device__ void load_scales(int wave) {
    if (wave == 0) {
      const int k_block = acquired_ - 1;
      const int lane = k_block % ScalesB::kLanes;
      if (lane == 0) {
        scales_b_.rotate();
        const int ahead = k_block + ScalesB::kLanes;
        if (ahead < range_.count()) {
          scales_b_.prefetch(range_, tile_n_, ahead, start_, true);
        } else {
          prefetch(next_tile_);
        }
      }
      scales_b_.broadcast(scales_.column, lane);
    }
    const uint32_t sfa = sfa_ + stage_ * kLayout.sfa_bytes() + wave * kWgmmaM * 4;
    scales_.row_0 = ld_shared(sfa);
    scales_.row_1 = ld_shared(sfa + 8 * 4);
  }

  __device__ void drain(float (&partial)[kAccumulators]) {
    wgmma_wait_group<0>();
    pin(partial);
  }

  // Gives a stage back to the producers that write to it; whole warps.
  __device__ void release(int stage) {
    const int lane = threadIdx.x % 32;
    const uint32_t empty = smem_.empty(stage);
    if constexpr (kMulticast == 1) {
      if (lane == 0) mbarrier_arrive(empty);
    } else {
      if (lane < kMulticast) mbarrier_arrive_remote(mapa(empty, lane));
    }
  }

  __device__ void add(float (&total)[kAccumulators], const float (&partial)[kAccumulators]) {
    promote(total, partial, scales_.row_0, scales_.row_1, scales_.column, tile_n_);
    // NOTE: without this pin the compiler may sink the additions below the next wgmma, and ptxas
    // then serialises all of them (C7514).
    pin(total);
  }

  const Smem smem_;
  const KRange range_;
  ScalesB scales_b_;
  RingPosition ring_;
  const uint64_t a_;  // matrix descriptors of this warpgroup's rows and columns in stage 0
  const uint64_t b_;
  const uint32_t sfa_;  // address of this thread's first row scale in stage 0
  const int column_;
  int tile_n_ = 0;
  Tile next_tile_ = {};
  int start_ = 0;     // of the tile's k order
  int acquired_ = 0;  // k-blocks of the tile
  int stage_ = 0;     // of the one acquired last
  Scales scales_ = {};
};

}  // namespace dg
