// Block-scaled FP8 GEMM for Hopper: D[m, n] = sum over k of A[m, k] * B[n, k], dequantised.
//
//   A    e4m3 [m, k] row-major       SFA  f32 [m, ceil(k/128)] m-contiguous: one scale per row
//   B    e4m3 [n, k] row-major            and k-block
//   D    bf16 [m, n] row-major       SFB  f32 [ceil(n/128), ceil(k/128)] row-major: one scale per
//                                         128 x 128 block
//
// For each k-block of 128, four wgmma (k = 32 each) leave A*B in a float32 accumulator; the CUDA
// cores then add it, times its two scales, to the running total ("promotion"). The tensor cores
// keep only about 14 bits while they accumulate FP8, so the promotion is what makes the sum exact
// enough as well as what applies the scales.
//
// A persistent grid of CTAs, one per SM, each warp-specialised:
//
//   role               threads  registers   per k-block                         per tile
//   producer warp      1 of 128 40          wait empty; TMA A, B, SFA -> stage  next tile
//   math warpgroup w   128      232 (255    wait full; 4 wgmma per 64-row wave; totals -> bf16 ->
//                               if alone)   arrive empty; promote               TMA store
//
//   barrier            arrivals                       signals
//   full[stage]        1 + the stage's bytes          producer/TMA -> math: stage holds data
//   empty[stage]       math warps x sharing CTAs      math -> producer(s): stage may be rewritten
//   partials_full[w]   1 + the partial sums' bytes    peers -> warpgroup w: split-k sums are here
//   partials_empty[w]  peers' warps                   owner -> peers: the slots may be rewritten
//
// Shared memory: smem_layout.h. The producer runs ahead across tile borders, and the warpgroups
// share nothing but the ring: they drift apart by up to its depth, so one's epilogue runs under
// the other's wgmma.
//
// Compile-time constants (namespace config, generated per kernel): kN, kK, kBlockM, kBlockN,
// kNumStages, kMathWarpgroups, kClusterM, kClusterN, kClusterK, kRasterM. m is a run-time value:
// one kernel serves every m.
#pragma once

// clang-format off: each file uses the ones before it.
#include "smem_layout.h"
#include "ptx.cuh"
#include "pipeline.cuh"
#include "scheduler.cuh"
#include "scales.cuh"
#include "epilogue.cuh"
#include "split_k.cuh"
// clang-format on

namespace dg {

// --- 1. Constants --------------------------------------------------------------------------------

constexpr SmemLayout kLayout = Smem::kLayout;
constexpr int kThreads = kWarpgroupThreads * (1 + config::kMathWarpgroups);
constexpr int kKBlocks = (config::kK + kBlockK - 1) / kBlockK;
constexpr int kClusterSize = config::kClusterM * config::kClusterN * config::kClusterK;
constexpr int kMulticast = config::kClusterM * config::kClusterN;  // CTAs that share a stage
constexpr int kWaves = kLayout.waves();
constexpr int kAccumulators = kLayout.warpgroup_n() / 2;  // registers of one wave, per thread

// With a second set of accumulators the next wgmma runs while the last one's result is promoted.
// Where they do not fit beside the totals, the other warpgroup's wgmma has to fill the gap.
constexpr bool kOverlapPromotion = (kWaves + 2) * kAccumulators <= 192;

static_assert(config::kN % 8 == 0, "rows of D must be multiples of 16 bytes for TMA");
static_assert(config::kK % 16 == 0, "rows of A and B must be multiples of 16 bytes for TMA");
static_assert(config::kBlockM % (kWgmmaM * (kLayout.splits_rows() ? config::kMathWarpgroups : 1)) ==
                  0,
              "every warpgroup takes whole waves of 64 rows");
static_assert(kLayout.warpgroup_n() % 8 == 0 && kLayout.warpgroup_n() <= 256,
              "wgmma takes n in steps of 8, up to 256");
static_assert(kWaves <= 2, "a warpgroup has one or two waves");
static_assert(config::kClusterK == 1 || (kWaves == 1 && kMulticast == 1),
              "split-k reduces one wave per warpgroup and does not combine with multicast");
static_assert(4 % config::kClusterK == 0, "split-k hands out whole warps' rows");
static_assert(kLayout.fits(), "shared memory of one SM");

// --- 2. Producer ---------------------------------------------------------------------------------

// This CTA's part of k, in k-blocks: all of it, or its share under split-k.
struct KRange {
  int begin;
  int end;

  __device__ KRange() : begin(0), end(kKBlocks) {
    if constexpr (config::kClusterK > 1) {
      const int rank = cluster_ctarank();
      begin = kKBlocks * rank / config::kClusterK;
      end = kKBlocks * (rank + 1) / config::kClusterK;
    }
  }
};

// With multicast each CTA loads its part of the shared operand for the whole cluster.
template <int kParts, int kRows>
__device__ __forceinline__ void load_operand(uint32_t smem, const TensorMap& map, uint32_t full,
                                             int k, int row, CachePolicy policy) {
  if constexpr (kParts == 1) {
    tma_load_2d(smem, map, full, k, row, policy);
  } else {
    constexpr int kPartRows = kRows / kParts;
    const int part = cluster_ctarank();
    tma_load_2d_multicast(smem + part * kPartRows * kBlockK, map, full, k, row + part * kPartRows,
                          (1 << kParts) - 1, policy);
  }
}

__device__ __forceinline__ void produce(const Smem& smem, const TensorMap& map_a,
                                        const TensorMap& map_b, const TensorMap& map_sfa, int m) {
  constexpr uint32_t kStageBytes = kLayout.a_bytes() + kLayout.b_bytes() + kLayout.sfa_bytes();
  const KRange range;
  // Weights pass through once when one row of tiles covers m; otherwise L2 keeps them for the next.
  const CachePolicy policy_b =
      m <= config::kBlockM * config::kClusterM ? kEvictFirst : kEvictNormal;
  Scheduler scheduler(m);
  RingPosition ring;
  for (Tile tile = scheduler.next(); tile.valid; tile = scheduler.next()) {
    // One instruction stream of three loads per k-block is all this warp has to issue; unrolled it
    // would not fit into the producer's registers.
#pragma unroll 1
    for (int k_block = range.begin; k_block < range.end; ++k_block, ring.advance()) {
      const int stage = ring.stage();
      const uint32_t full = smem.full(stage);
      mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);
      mbarrier_arrive_expect_tx(full, kStageBytes);
      const int k = k_block * kBlockK;
      load_operand<config::kClusterM, config::kBlockN>(smem.b(stage), map_b, full, k, tile.n,
                                                       policy_b);
      load_operand<config::kClusterN, config::kBlockM>(smem.a(stage), map_a, full, k, tile.m,
                                                       kEvictNormal);
      tma_load_2d(smem.sfa(stage), map_sfa, full, tile.m, k_block, kEvictNormal);
    }
  }
}

// --- 3. Math -------------------------------------------------------------------------------------

// One math warpgroup's walk through the k-blocks of its tiles.
//
// What costs time here is the gap between a wgmma's end and the next one's start. So everything the
// next one needs (the stage being full, its addresses and scales) is ready before the last one is
// waited for, and if registers allow, the promotion also runs under the next wgmma.
class Mainloop {
 public:
  // `row`, `column`: the warpgroup's corner in the tile; `warp`: rank in the warpgroup.
  __device__ Mainloop(const Smem& smem, const float* sfb, int row, int column, int warp)
      : smem_(smem),
        scales_b_(sfb),
        a_(wgmma_descriptor(smem.a(0) + row * kBlockK)),
        b_(wgmma_descriptor(smem.b(0) + column * kBlockK)),
        sfa_(smem.sfa(0) + (row + warp * 16 + static_cast<int>(threadIdx.x) % 32 / 4) * 4),
        column_(column) {}

  // Loads the first scales of a tile ahead of time.
  __device__ void prefetch(const Tile& tile) {
    scales_b_.prefetch(tile.n + column_, range_.begin, range_.end, tile.valid);
  }

  // Accumulates a tile into `total`, which is zero.
  __device__ void run(const Tile& tile, const Tile& next_tile,
                      float (&total)[kWaves][kAccumulators]) {
    tile_n_ = tile.n + column_;
    next_tile_ = next_tile;
    k_block_ = range_.begin;
    acquire();
    if constexpr (!kOverlapPromotion) {
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
        const Scales scales = issue(partial, wave);
        const int stage = stage_;
        if (wave == kWaves - 1) {
          more = k_block_ < range_.end;
          if (more) acquire();
        }
        drain(partial);
        if (wave == kWaves - 1) release(stage);
        add(total[wave], partial, scales);
      }
    }
  }

  // Two accumulators, for even and odd k-blocks.
  __device__ void run_overlapped(float (&total)[kAccumulators]) {
    float even[kAccumulators], odd[kAccumulators];
    Scales even_scales = issue(even, 0);
    Scales odd_scales;
    while (k_block_ + 1 < range_.end) {
      step(total, even, even_scales, odd, odd_scales);
      step(total, odd, odd_scales, even, even_scales);
    }
    if (k_block_ < range_.end) {
      step(total, even, even_scales, odd, odd_scales);
      last(total, odd, odd_scales);
    } else {
      last(total, even, even_scales);
    }
  }

  // Two accumulators, for the first and second wave of every k-block.
  __device__ void run_overlapped(float (&total_0)[kAccumulators],
                                 float (&total_1)[kAccumulators]) {
    float partial_0[kAccumulators], partial_1[kAccumulators];
    Scales scales_0 = issue(partial_0, 0);
    Scales scales_1;
    while (k_block_ < range_.end) {
      drain(partial_0);
      scales_1 = issue(partial_1, 1);
      add(total_0, partial_0, scales_0);
      step(total_1, partial_1, scales_1, partial_0, scales_0);
    }
    drain(partial_0);
    scales_1 = issue(partial_1, 1);
    add(total_0, partial_0, scales_0);
    last(total_1, partial_1, scales_1);
  }

  // Finishes `done`, starts the next k-block in `next`, and promotes while that one runs.
  __device__ void step(float (&total)[kAccumulators], float (&done)[kAccumulators],
                       const Scales& done_scales, float (&next)[kAccumulators],
                       Scales& next_scales) {
    const int stage = stage_;
    acquire();
    drain(done);
    release(stage);
    next_scales = issue(next, 0);
    add(total, done, done_scales);
  }

  __device__ void last(float (&total)[kAccumulators], float (&done)[kAccumulators],
                       const Scales& done_scales) {
    drain(done);
    release(stage_);
    add(total, done, done_scales);
  }

  // Waits until the next k-block is in shared memory and takes up its column scales.
  __device__ void acquire() {
    const int lane = (k_block_ - range_.begin) % ScalesB::kLanes;
    if (lane == 0) {
      scales_b_.rotate();
      const int ahead = k_block_ + ScalesB::kLanes;
      if (ahead < range_.end) {
        scales_b_.prefetch(tile_n_, ahead, range_.end, true);
      } else {
        prefetch(next_tile_);
      }
    }
    scales_b_.broadcast(column_scales_, lane);
    stage_ = ring_.stage();
    mbarrier_wait(smem_.full(stage_), ring_.parity());
    ring_.advance();
    ++k_block_;
  }

  // Starts partial = A * B for one wave of the acquired k-block, and reads its scales meanwhile.
  __device__ Scales issue(float (&partial)[kAccumulators], int wave) {
    const uint64_t a = a_ + (stage_ * kLayout.a_bytes() + wave * kWgmmaM * kBlockK) / 16;
    const uint64_t b = b_ + stage_ * kLayout.b_bytes() / 16;
    pin(partial);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK; k += 32) wgmma(partial, a + k / 16, b + k / 16, k != 0);
    wgmma_commit_group();
    const uint32_t sfa = sfa_ + stage_ * kLayout.sfa_bytes() + wave * kWgmmaM * 4;
    Scales scales;
    scales.row_0 = ld_shared(sfa);
    scales.row_1 = ld_shared(sfa + 8 * 4);
#pragma unroll
    for (int i = 0; i < ScalesB::kScaleBlocks; ++i) scales.column[i] = column_scales_[i];
    return scales;
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

  __device__ void add(float (&total)[kAccumulators], const float (&partial)[kAccumulators],
                      const Scales& scales) {
    promote(total, partial, scales.row_0, scales.row_1, scales.column, tile_n_);
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
  int k_block_ = 0;  // the next one to acquire
  int stage_ = 0;    // of the one acquired last
  float column_scales_[ScalesB::kScaleBlocks];
};

__device__ __forceinline__ void multiply(const Smem& smem, const TensorMap& map_d, const float* sfb,
                                         int m, int warpgroup) {
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int row = kLayout.splits_rows() ? warpgroup * kLayout.warpgroup_m() : 0;
  const int column = kLayout.splits_rows() ? 0 : warpgroup * kLayout.warpgroup_n();
  Epilogue epilogue(smem, map_d, warpgroup);
  SplitK split_k(smem, warpgroup, warp);
  Mainloop mainloop(smem, sfb, row, column, warp);
  Scheduler scheduler(m);
  Tile tile = scheduler.next();
  mainloop.prefetch(tile);

  while (tile.valid) {
    const Tile next_tile = scheduler.next();
    float total[kWaves][kAccumulators] = {};
    mainloop.run(tile, next_tile, total);
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) {
      const int wave_m = tile.m + row + wave * kWgmmaM;
      const int n = tile.n + column;
      if constexpr (config::kClusterK > 1) {
        split_k.reduce(total[wave]);
        epilogue.store(total[wave], wave_m + split_k.first_row(), n, split_k.owns(),
                       split_k.row());
      } else {
        epilogue.store(total[wave], wave_m, n, true, warp * 16);
      }
    }
    tile = next_tile;
  }
  epilogue.finish();
}

// --- 4. Kernel -----------------------------------------------------------------------------------

}  // namespace dg

extern "C" __global__ void __launch_bounds__(dg::kThreads, 1)
    DG_KERNEL_NAME(const __grid_constant__ dg::TensorMap map_a,
                   const __grid_constant__ dg::TensorMap map_b,
                   const __grid_constant__ dg::TensorMap map_sfa,
                   const __grid_constant__ dg::TensorMap map_d, const float* sfb, int m) {
  using namespace dg;
  // Swizzle patterns are functions of the address, so the rings start on 1024-byte boundaries.
  extern __shared__ __align__(1024) char dynamic_smem[];
  const Smem smem = {smem_address(dynamic_smem)};
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  // Warpgroup 0 produces; the math warpgroups follow.
  const bool producer = warp == 0;

  if (producer && elect_sync()) {
    prefetch_tensormap(map_a);
    prefetch_tensormap(map_b);
    prefetch_tensormap(map_sfa);
    for (int stage = 0; stage < config::kNumStages; ++stage) {
      mbarrier_init(smem.full(stage), 1);
      mbarrier_init(smem.empty(stage), 4 * config::kMathWarpgroups * kMulticast);
    }
    if constexpr (config::kClusterK > 1) {
      for (int warpgroup = 0; warpgroup < config::kMathWarpgroups; ++warpgroup) {
        mbarrier_init(smem.partials_full(warpgroup), SplitK::kFullArrivals);
        mbarrier_init(smem.partials_empty(warpgroup), SplitK::kEmptyArrivals);
      }
    }
    fence_mbarrier_init();
  }
  __syncwarp();

  // Everyone waits for the barriers. The producer made them, so it starts loading at once, unless
  // its loads go to a peer whose barriers may not exist yet.
  if constexpr (kClusterSize > 1) {
    barrier_cluster_arrive_relaxed();
    if (kMulticast > 1 || !producer) barrier_cluster_wait();
  } else if (producer) {
    barrier_arrive(0, kThreads);
  } else {
    barrier_sync(0, kThreads);
  }

  if (warp < 4) {
    if constexpr (config::kMathWarpgroups > 1) setmaxnreg_dec<40>();
    if (producer) {
      if (elect_sync()) produce(smem, map_a, map_b, map_sfa, m);
      __syncwarp();
      if constexpr (kClusterSize > 1 && kMulticast == 1) barrier_cluster_wait();
    }
  } else {
    if constexpr (config::kMathWarpgroups > 1) setmaxnreg_inc<232>();
    multiply(smem, map_d, sfb, m, warp / 4 - 1);
  }

  // Peers write into this CTA's shared memory: no one leaves before all are done.
  if constexpr (kClusterSize > 1) {
    barrier_cluster_arrive();
    barrier_cluster_wait();
  }
}
