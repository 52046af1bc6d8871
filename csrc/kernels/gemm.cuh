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
#include "mainloop.cuh"
#include "epilogue.cuh"
#include "split_k.cuh"
// clang-format on

namespace dg {

// --- 1. Constants --------------------------------------------------------------------------------

constexpr int kThreads = kWarpgroupThreads * (1 + config::kMathWarpgroups);

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
static_assert(kLayout.total_bytes() <= kMaxSmemBytes, "shared memory of one SM");

// --- 2. Producer ---------------------------------------------------------------------------------

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
  const KRange range(m);
  // Weights pass through once when one row of tiles covers m; otherwise L2 keeps them for the next.
  const CachePolicy policy_b = m <= kRowsPerCluster ? kEvictFirst : kEvictNormal;
  Scheduler scheduler(m);
  RingPosition ring;
  for (Tile tile = scheduler.next(); tile.valid; tile = scheduler.next()) {
    const int start = range.start(tile);
    // One instruction stream of three loads per k-block is all this warp has to issue; unrolled it
    // would not fit into the producer's registers.
#pragma unroll 1
    for (int i = 0; i < range.count(); ++i, ring.advance()) {
      const int k_block = range.block(i, start);
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

__device__ __forceinline__ void multiply(const Smem& smem, const TensorMap& map_d, const float* sfb,
                                         int m, int warpgroup) {
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int row = kLayout.splits_rows() ? warpgroup * kLayout.warpgroup_m() : 0;
  const int column = kLayout.splits_rows() ? 0 : warpgroup * kLayout.warpgroup_n();
  Epilogue epilogue(smem, map_d, warpgroup);
  SplitK split_k(smem, warpgroup, warp);
  Mainloop mainloop(smem, sfb, m, row, column, warp);
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
        epilogue.store(total[wave], wave, wave_m + split_k.first_row(), n, split_k.owns(),
                       split_k.row());
        if (next_tile.valid) split_k.release();
      } else {
        epilogue.store(total[wave], wave, wave_m, n, true, warp * 16);
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
  // its loads go to a peer whose barriers may not exist yet. Split-k waits for its peers when it
  // first writes to them.
  if constexpr (kClusterSize > 1) barrier_cluster_arrive_relaxed();
  if constexpr (kMulticast > 1) {
    barrier_cluster_wait();
  } else if (producer) {
    barrier_arrive(0, kThreads);
  } else {
    barrier_sync(0, kThreads);
  }

  if (warp < 4) {
    if constexpr (config::kMathWarpgroups > 1) setmaxnreg_dec<40>();
    if (producer && elect_sync()) produce(smem, map_a, map_b, map_sfa, m);
    __syncwarp();
  } else {
    if constexpr (config::kMathWarpgroups > 1) setmaxnreg_inc<232>();
    multiply(smem, map_d, sfb, m, warp / 4 - 1);
  }

  // Peers that multicast still send arrivals here: no one leaves before all are done. Split-k needs
  // no such end, because every CTA waits for all that is sent to it.
  if constexpr (kMulticast > 1) {
    barrier_cluster_arrive();
    barrier_cluster_wait();
  }
}
