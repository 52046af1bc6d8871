// Block-scaled FP8 GEMM for Hopper: D[m, n] = sum over k of A[m, k] * B[n, k], dequantised.
//
//   A    FP8 [m, k] row-major        SFA  f32 [m, ceil(k/128)] m-contiguous: one scale per row
//   B    FP8 [n, k] row-major             and k-block
//   D    bf16 [m, n] row-major       SFB  f32 [ceil(n/128), ceil(k/128)] row-major: one scale per
//                                         128 x 128 block
//
// Grouped operations have one B and SFB per group, stacked along n, and a rule that says which rows
// of A go with which group (grouping.h). row_tiles.cuh turns the rule into tiles; the rest knows
// a tile's group, and which of its rows are not to be written.
//
// For each k-block of 128, four wgmma (k = 32 each) leave A*B in a float32 accumulator; the CUDA
// cores then add it, times its two scales, to the running total ("promotion"). The tensor cores
// keep only about 14 bits while they accumulate FP8, so the promotion is what makes the sum exact
// enough as well as what applies the scales.
//
// A persistent grid of CTAs, one per SM, each warp-specialised:
//
//   role               threads  registers   per k-block                         per tile
//   operand warp       1 of 128 40          wait empty; copy A and B into the   find the next tile,
//                                           stage                               announce it
//   scale warp         1 (32 where          wait empty; copy SFA and SFB        find the next tile
//                      lanes copy SFA)
//   two more           1                                                        (make the barriers)
//   math warpgroup w   128      232 (255    wait full; 4 wgmma per 64-row wave; totals -> bf16 ->
//                               if alone)   arrive empty; promote               TMA store
//
//   barrier            arrivals                       signals
//   full[stage]        2 (33: scale_arrivals), bytes  both warps and TMA -> math: stage holds data
//   empty[stage]       math warps x sharing CTAs      math -> both warps: stage may be rewritten
//   exchange[warp]     1, and bytes in the CTA that   split-k, between namesakes in a cluster: sums
//                      stores the warp's rows         have come; or in the others, were read
//
// Shared memory: smem_layout.h. The producers run ahead across tile borders, and the operand warp
// says which tile comes next (TileSlot), so the math warpgroups need no schedule of their own. They
// share nothing but the ring: they drift apart by up to its depth, so one's epilogue runs under the
// other's wgmma.
//
// Compile-time constants (namespace config, generated per kernel): kGrouping, kN, kK, kBlockM,
// kBlockN, kNumStages, kMathWarpgroups, kClusterM, kClusterN, kClusterK, kRasterM, kRotatesK,
// kHasParts, kArrivalsPerWarp, kStreamsOnly. m and the groups are run-time values: one kernel
// serves them all, but without kHasParts a dense one only m up to a tile's rows, or a multiple.
#pragma once

// clang-format off: each file uses the ones before it.
#include "grouping.h"
#include "smem_layout.h"
#include "schedule.h"
#include "ptx.cuh"
#include "pipeline.cuh"
#include "row_tiles.cuh"
#include "scheduler.cuh"
#include "scales.cuh"
#include "mainloop.cuh"
#include "epilogue.cuh"
#include "split_k.cuh"
// clang-format on

namespace dg {

// --- 1. Constants --------------------------------------------------------------------------------

constexpr int kMathThreads = kWarpgroupThreads * config::kMathWarpgroups;
constexpr int kThreads = kWarpgroupThreads + kMathThreads;

// Warps of warpgroup 0; the operand warp comes first.
constexpr int kScaleWarp = 1;
constexpr int kFullWarp = 2;  // makes the full barriers; the next one the empty ones and split-k's
constexpr int kFirstMathWarp = 4;

// Named barriers; those between are the math warpgroups' own.
constexpr int kTilesCounted = kEpilogueBarrier - 1;
constexpr int kCountThreads = 32 + kMathThreads;  // the scale warp, and those who wait for it
constexpr int kOperandsBegin = kEpilogueBarrier + config::kMathWarpgroups;
constexpr int kScalesBegin = kOperandsBegin + 1;
constexpr int kBeginThreads = 3 * 32;  // both warps that make barriers, and the one that waits

static_assert(config::kN % 8 == 0, "rows of D must be multiples of 16 bytes for TMA");
static_assert((config::kBlockM & (config::kBlockM - 1)) == 0,
              "halves and quarters of a tile are parts of it");
static_assert(!config::kHasParts || config::kClusterN == 1, "shares of A are of whole tiles");
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
static_assert(kLayout.sfa_offset() % 128 == 0 && kLayout.sfa_bytes() % 128 == 0,
              "TMA writes boxes to multiples of 128 bytes");
static_assert(kLayout.total_bytes() <= kMaxSmemBytes, "shared memory of one SM");

// --- 2. Producers --------------------------------------------------------------------------------

// Two warps walk through the same tiles and k-blocks: one copies A and B and tells the math warps
// what the tile is, the other copies scales. One warp that issued all four took longer to ask for
// the next stage: 2 to 4 % of prefill, 1 to 3 % of decode.

// Until barriers can be used. How soon the first copy is under way is time that every kernel takes,
// of decode's 7 us and more once 0.9, now 0.5: so the producers look for their first tile while
// other warps make the barriers, and wait for those last. `begin`: each waits at a named barrier of
// its own. PTX lets warps block at one barrier in different instructions, but synccheck (CUDA 13.0)
// reports it.
__device__ __forceinline__ void wait_for_barriers(int begin) {
  if constexpr (kClusterSize > 1) {
    barrier_cluster_wait();  // for the peers' as well, which copies signal
  } else {
    barrier_sync(begin, kBeginThreads);
  }
}

// A by whole tiles, or with multicast by a CTA's share of one; and by parts of tiles, for kernels
// that know them.
struct MapsOfA {
  TensorMap map[config::kHasParts ? 2 : 1];
};

// Which of a tile's rows of A are copied, and by which boxes: one of the whole tile or, where rows
// are missing, boxes of KernelParams::part_rows rows that hold at least one of them. What lies in
// shared memory where the others would, makes rows of D that nobody stores.
class PartOfA {
 public:
  __device__ PartOfA(const KernelParams& params, int tile_rows) {
    if constexpr (!config::kHasParts) {
      // Every tile is as tall, or it has all rows there are.
      rows_ = config::kClusterN > 1 ? config::kBlockM : params.part_rows;
      is_whole_ = true;
    } else if constexpr (kGrouping == Grouping::kDense) {
      // The last row of tiles has part_rows; one behind it, of a cluster, has none, and stays what
      // it is by copying as many zeros.
      is_whole_ = tile_rows >= config::kBlockM;
      rows_ = is_whole_ ? config::kBlockM : params.part_rows;
    } else {
      // A power of two. At least one part; all of them are the whole tile.
      const int last = params.part_rows - 1;
      rows_ = min(config::kBlockM, (max(tile_rows, 1) + last) & ~last);
      is_whole_ = rows_ == config::kBlockM;
    }
    box_rows_ = is_whole_ ? rows_ : params.part_rows;
  }

  __device__ const TensorMap& map(const MapsOfA& maps) const {
    return maps.map[config::kHasParts && !is_whole_ ? 1 : 0];
  }
  __device__ int rows() const { return rows_; }
  __device__ int box_rows() const { return box_rows_; }

 private:
  bool is_whole_;
  int rows_;
  int box_rows_;
};

// The part of an operand that one CTA loads: all of it, or with multicast a share, for all of the
// cluster.
template <int kParts, int kRows>
class OperandLoader {
 public:
  // `ring`: its stages in shared memory; `row`: the tile's first row.
  __device__ OperandLoader(const TensorMap& map, uint32_t ring, int row) : map_(map) {
    const int skipped = kParts == 1 ? 0 : cluster_ctarank() * (kRows / kParts);
    ring_ = ring + skipped * kBlockK;
    row_ = row + skipped;
  }

  __device__ void load(int stage, uint32_t full, int k) const {
    const uint32_t smem = ring_ + stage * (kRows * kBlockK);
    if constexpr (kParts == 1) {
      tma_load_2d(smem, map_, full, k, row_);
    } else {
      tma_load_2d_multicast(smem, map_, full, k, row_, (1 << kParts) - 1);
    }
  }

 private:
  const TensorMap& map_;
  uint32_t ring_;
  int row_;
};

// The operand warp's part of a tile: A and B of its k-blocks, into the stages from `ring` on. The
// whole warp steps through them, because then addresses live in uniform registers, where TMA takes
// them from; one thread issues.
//
// With tall tiles few stages fit, and how soon a stage that became free is asked for is time that
// the tensor cores wait: as little as can be stands between the wait and the copies. NOTE: with a
// __syncwarp in front of the loop, ptxas takes the lanes for diverged and moves every address to a
// uniform register where it is used.
__device__ __forceinline__ void load_operands(const Smem& smem, const MapsOfA& maps_a,
                                              const TensorMap& map_b, const KernelParams& params,
                                              const KRange& range, const Tile& tile,
                                              RingPosition ring, bool is_first) {
  const PartOfA part(params, tile.rows);
  const TensorMap& map_a = part.map(maps_a);
  const OperandLoader<config::kClusterN, config::kBlockM> a(map_a, smem.a(0), tile.m);
  const OperandLoader<config::kClusterM, config::kBlockN> b(map_b, smem.b(0),
                                                            tile.group * config::kN + tile.n);
  const int bytes = part.rows() * kBlockK + kLayout.b_bytes();  // of a stage
  int k_block = range.first(tile, params.m);
  if (is_first) wait_for_barriers(kOperandsBegin);
  // A handful of copies per k-block is all there is to issue; unrolled they would not fit into the
  // producers' registers.
#pragma unroll 1
  for (int left = range.count(); left > 0; --left) {
    const int stage = ring.stage();
    const uint32_t full = smem.full(stage);
    const int k = k_block * kBlockK;
    mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);
    if (elect_sync()) {
      mbarrier_arrive_expect_tx(full, bytes);
      b.load(stage, full, k);
      a.load(stage, full, k);
      if constexpr (config::kHasParts && kGrouping != Grouping::kDense) {
        // Seldom more than one. The first is not in the loop: TMA reads the registers that a loop
        // steps long after it is issued.
#pragma unroll 1
        for (int row = part.box_rows(); row < part.rows(); row += part.box_rows()) {
          tma_load_2d(smem.a(stage) + row * kBlockK, map_a, full, k, tile.m + row);
        }
      }
    }
    k_block = range.next(k_block);
    ring.advance();
  }
}

// TMA reads from multiples of 16 bytes on, or the kernel fails with an illegal instruction, and
// counts elements in 31 bits. Whether a tile's SFA begins at such places, in all k-blocks.
__device__ __forceinline__ bool copies_by_tma(const KernelParams& params, int m) {
  constexpr int kMostRows = (0x7fffffff - 65536) / kKBlocks;
  return (params.sfa_pitch | m) % 4 == 0 && params.sfa_pitch <= kMostRows;
}

// Tiles of groups begin at any row.
constexpr bool kTilesAreAligned =
    kGrouping == Grouping::kDense || kGrouping == Grouping::kContiguous;

// Arrivals of the scale warp on a full barrier: one thread's, or every lane's, if there are tiles
// whose scales the lanes copy.
__device__ __forceinline__ int scale_arrivals(const KernelParams& params) {
  return kTilesAreAligned && copies_by_tma(params, 0) ? 1 : 32;
}

// A k-block's row of scales. Unsigned, one instruction; a signed product takes several.
__device__ __forceinline__ const float* scales_at(const float* scales, uint32_t k_block,
                                                  uint32_t pitch) {
  return scales + uint64_t{k_block} * pitch;
}

// SFB of a tile's `block`-th 128 columns. Columns past n have no scale of their own and need none.
__device__ __forceinline__ const float* sfb_of(const KernelParams& params, const Tile& tile,
                                               int block) {
  const int row = min(tile.n / 128 + block, kNBlocks - 1);
  return params.sfb + (size_t(tile.group) * kNBlocks + row) * kKBlocks;
}

// The scale warp's part of a tile: SFA and SFB of its k-blocks. One thread copies both, SFA by TMA,
// to which all k-blocks are one row. What it copies past the last row of A is never used.
__device__ __forceinline__ void load_scales(const Smem& smem, const TensorMap& map_sfa,
                                            const KernelParams& params, const KRange& range,
                                            const Tile& tile, RingPosition ring) {
  const int pitch = params.sfa_pitch;
  const int bytes = min(config::kBlockM, pitch) * 4;
  int k_block = range.first(tile, params.m);
  int sfa = k_block * pitch + tile.m;
  const float* sfb[kTileScaleBlocks];
#pragma unroll
  for (int block = 0; block < kTileScaleBlocks; ++block) {
    sfb[block] = sfb_of(params, tile, block) + k_block;
  }
#pragma unroll 1
  for (int left = range.count(); left > 0; --left) {
    const int stage = ring.stage();
    const uint32_t full = smem.full(stage);
    mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);
    if (elect_sync()) {
      mbarrier_expect_tx(full, bytes);
      tma_load_2d(smem.sfa(stage), map_sfa, full, sfa, 0);
#pragma unroll
      for (int block = 0; block < kTileScaleBlocks; ++block) {
        cp_async_4(smem.sfb(stage) + 4 * block, sfb[block]);
      }
      cp_async_mbarrier_arrive(full);
      if constexpr (!kTilesAreAligned) mbarrier_arrive(full, 31);  // for the other lanes
    }
    // Stepped where k does not wrap around: a sixth fewer instructions in the loop.
    if constexpr (KRange::kRotates) {
      const int next = range.next(k_block);
      sfa = next * pitch + tile.m;
#pragma unroll
      for (int block = 0; block < kTileScaleBlocks; ++block) sfb[block] += next - k_block;
      k_block = next;
    } else {
      sfa += pitch;
#pragma unroll
      for (int block = 0; block < kTileScaleBlocks; ++block) ++sfb[block];
    }
    ring.advance();
  }
}

// The same, 4 bytes at a time: lanes take rows of SFA in turn, the first ones SFB, too. Unrolled,
// 66 instructions a stage with 128 rows; about 95, in a loop over rows, took up to 21 % longer.
__device__ __forceinline__ void load_scales_by_lanes(const Smem& smem, const KernelParams& params,
                                                     const KRange& range, const Tile& tile,
                                                     RingPosition ring) {
  const int lane = laneid();
  const uint32_t pitch = params.sfa_pitch;
  const int rows = params.sfa_pitch - tile.m - lane;  // that there are from the lane's first one on
  const float* const sfa = params.sfa + tile.m + lane;
  const float* const sfb = sfb_of(params, tile, min(lane, kTileScaleBlocks - 1));
  int k_block = range.first(tile, params.m);
#pragma unroll 1
  for (int left = range.count(); left > 0; --left) {
    const int stage = ring.stage();
    const uint32_t full = smem.full(stage);
    const float* const source = scales_at(sfa, k_block, pitch);
    const uint32_t target = smem.sfa(stage) + lane * 4;
    mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);
#pragma unroll
    for (int row = 0; row < config::kBlockM; row += 32) {
      if (row < rows) cp_async_4(target + row * 4, source + row);
    }
    if (lane < kTileScaleBlocks) cp_async_4(smem.sfb(stage) + lane * 4, sfb + k_block);
    cp_async_mbarrier_arrive(full);
    k_block = range.next(k_block);
    ring.advance();
  }
}

// A tile without k-blocks takes one stage, in which each producer arrives as often as in others.
__device__ __forceinline__ void pass_stage(const Smem& smem, const RingPosition& ring,
                                           int arrivals) {
  const int stage = ring.stage();
  mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);
  mbarrier_arrive(smem.full(stage), arrivals);
}

__device__ __forceinline__ void produce_operands(const Smem& smem, const MapsOfA& maps_a,
                                                 const TensorMap& map_b,
                                                 const KernelParams& params) {
  Scheduler scheduler(params);
  const KRange range;
  RingPosition ring;
  TileSlot slot;
  for (bool is_first = true;; is_first = false) {
    const Tile tile = scheduler.next();
    st_shared_v4_s32_elect(smem.tile(slot.next()), make_int4(tile.m, tile.n, tile.rows, tile.kind));
    const bool loads = tile.kind >= kMultiply;
    if (loads) {
      load_operands(smem, maps_a, map_b, params, range, tile, ring, is_first);
    } else {
      if (is_first) wait_for_barriers(kOperandsBegin);
      if (elect_sync()) pass_stage(smem, ring, 1);
    }
    __syncwarp();
    if (tile.kind == kStop) break;
    ring.advance(loads ? range.count() : 1);
  }
}

__device__ __forceinline__ void produce_scales(const Smem& smem, const TensorMap& map_sfa,
                                               const KernelParams& params) {
  if (elect_sync()) prefetch_tensormap(map_sfa);
  Scheduler scheduler(params);
  const int count = scheduler.multiply_count();
  if (elect_sync()) st_shared_s32(smem.tile_count(), count);
  const KRange range;
  RingPosition ring;
  // NOTE: this loop, whose lanes copy each for itself, may not ask whether it is the first time, as
  // the operand warp's does: ptxas took the lanes for diverged, and m = 1 a fifth longer.
  Tile tile = scheduler.next();
  wait_for_barriers(kScalesBegin);
  barrier_arrive(kTilesCounted, kCountThreads);
  while (true) {
    const bool loads = tile.kind >= kMultiply;
    if (!loads) {
      if (elect_sync()) pass_stage(smem, ring, scale_arrivals(params));
    } else if (copies_by_tma(params, kTilesAreAligned ? 0 : tile.m)) {
      load_scales(smem, map_sfa, params, range, tile, ring);
    } else {
      load_scales_by_lanes(smem, params, range, tile, ring);
    }
    __syncwarp();
    if (tile.kind == kStop) break;
    ring.advance(loads ? range.count() : 1);
    tile = scheduler.next();
  }
}

// --- 3. Math -------------------------------------------------------------------------------------

// Zeroes the rows of a warp that belong to no group; `m` is the first one.
__device__ __forceinline__ void mask_rows(float (&total)[kAccumulators], const KernelParams& params,
                                          int m) {
  const int row = m + static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int index = row + 8 * half < params.m ? params.detail[row + 8 * half] : -1;
    const bool grouped = index >= 0 && index < params.num_groups;
#pragma unroll
    for (int i = 2 * half; i < kAccumulators; i += 4) {
      total[i] = grouped ? total[i] : 0;
      total[i + 1] = grouped ? total[i + 1] : 0;
    }
  }
}

// A tile of zeros. Its chunks of 16 bytes go round all math threads, of all CTAs that would split
// k.
__device__ __forceinline__ void store_zeros(void* d, const MathTile& tile) {
  constexpr int kRowChunks = config::kBlockN / 8;
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads +
                     (config::kClusterK > 1 ? cluster_ctarank() * kMathThreads : 0);
  const int chunks = min(tile.rows, config::kBlockM) * kRowChunks;
#pragma unroll 1
  for (int i = thread; i < chunks; i += kMathThreads * config::kClusterK) {
    const int column = tile.n + i % kRowChunks * 8;
    const size_t element = size_t(tile.m + i / kRowChunks) * config::kN + column;
    if (column < config::kN) {
      st_global_v4_s32(static_cast<char*>(d) + 2 * element, make_int4(0, 0, 0, 0));
    }
  }
}

__device__ __forceinline__ void multiply(const Smem& smem, const TensorMap& map_d,
                                         const KernelParams& params, int warpgroup) {
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int row = kLayout.splits_rows() ? warpgroup * kLayout.warpgroup_m() : 0;
  const int column = kLayout.splits_rows() ? 0 : warpgroup * kLayout.warpgroup_n();
  Epilogue epilogue(smem, map_d, params.d, warpgroup);
  SplitK split_k(smem, warpgroup, warp);
  Mainloop mainloop(smem, row, column, warp);

  // NOTE: a loop that ended where the last tile is announced would end, as far as ptxas can tell,
  // at another time for each lane, and whatever a lane may be alone with cannot live in uniform
  // registers. Matrix descriptors must: moving them there before every wgmma cost 7 to 20 %. So the
  // number of tiles is known beforehand, and tiles without wgmma have a loop of their own.
  const int count = __shfl_sync(0xffffffff, ld_shared_s32(smem.tile_count()), 0);
  for (int i = 0; i < count; ++i) {
    const MathTile tile = mainloop.next_tile();
    if constexpr (config::kStreamsOnly) {
      mainloop.stream();
      continue;
    }
    if (config::kClusterK > 1 && i > 0) split_k.release();
    float total[kWaves][kAccumulators] = {};
    mainloop.run(total);
    const int m = tile.m + row;
    const int n = tile.n + column;
    const int rows = tile.rows - row;
    if (kGrouping == Grouping::kContiguous && tile.kind == kMultiplyMask) {
      mask_rows(total[0], params, m + warp * 16);
      if constexpr (kWaves == 2) mask_rows(total[1], params, m + kWgmmaM + warp * 16);
    }
    if constexpr (config::kClusterK > 1) {
      split_k.reduce(total[0]);
      epilogue.store(total, m + split_k.first_row(), n, rows - split_k.first_row(), split_k.owns(),
                     split_k.row());
    } else {
      epilogue.store(total, m, n, rows, true, warp * 16);
    }
  }
  if constexpr (kGrouping != Grouping::kDense) {
    for (MathTile tile = mainloop.next_tile(); tile.kind != kStop; tile = mainloop.next_tile()) {
      mainloop.skip();
      store_zeros(params.d, tile);
    }
  }
  epilogue.finish();
}

// --- 4. Kernel -----------------------------------------------------------------------------------

// One thread makes them all: lanes would make theirs one after the other, too.
__device__ __forceinline__ void make_barriers(const Smem& smem, const KernelParams& params,
                                              int warp) {
  if (elect_sync()) {
    if (warp == kFullWarp) {
      for (int stage = 0; stage < config::kNumStages; ++stage) {
        mbarrier_init(smem.full(stage), 1 + scale_arrivals(params));
      }
    } else {
      constexpr int kArrivals = kMathThreads / 32 * config::kArrivalsPerWarp * kMulticast;
      for (int stage = 0; stage < config::kNumStages; ++stage) {
        mbarrier_init(smem.empty(stage), kArrivals);
      }
      if constexpr (config::kClusterK > 1) {
        for (int math_warp = 0; math_warp < 4 * config::kMathWarpgroups; ++math_warp) {
          mbarrier_init(smem.exchange(math_warp), SplitK::kArrivals);
        }
      }
    }
    fence_mbarrier_init();
  }
  __syncwarp();
}

// Says to the cluster that those barriers which are this warp's to make are made.
__device__ __forceinline__ void join_cluster() {
  if constexpr (kClusterSize > 1) barrier_cluster_arrive_relaxed();
}

}  // namespace dg

extern "C" __global__ void __launch_bounds__(dg::kThreads, 1)
    DG_KERNEL_NAME(const __grid_constant__ dg::MapsOfA maps_a,
                   const __grid_constant__ dg::TensorMap map_b,
                   const __grid_constant__ dg::TensorMap map_sfa,
                   const __grid_constant__ dg::TensorMap map_d,
                   const __grid_constant__ dg::KernelParams params) {
  using namespace dg;
  // Swizzle patterns are functions of the address, so the rings start on 1024-byte boundaries.
  extern __shared__ __align__(1024) char dynamic_smem[];
  const Smem smem = {smem_address(dynamic_smem)};
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);

  if constexpr (config::kMathWarpgroups > 1) {
    if (warp < kFirstMathWarp) setmaxnreg_dec<40>();
  }

  // NOTE: ptxas puts the last branch first, behind the code above. That is the operand warp's,
  // whose way to the first copy every kernel waits for: instructions come from memory, too. In
  // front of it were 18 KB of the others'; without them decode takes up to 1 % less, 2 to 4 % where
  // the caches of instructions are cold.
  //
  // NOTE: comparisons for equality would become a jump through a table in constant memory.
  if (warp >= kFirstMathWarp) {
    if (warp == kFirstMathWarp && elect_sync()) {
      prefetch_tensormap(map_b);
      prefetch_tensormap(maps_a.map[0]);
    }
    __syncwarp();
    join_cluster();
    if constexpr (kClusterSize > 1) barrier_cluster_wait();
    if constexpr (config::kMathWarpgroups > 1) setmaxnreg_inc<232>();
    barrier_sync(kTilesCounted, kCountThreads);
    multiply(smem, map_d, params, warp / 4 - 1);
  } else if (warp >= kFullWarp) {
    make_barriers(smem, params, warp);
    join_cluster();
    if constexpr (kClusterSize > 1) {
      barrier_cluster_wait();
    } else {
      barrier_arrive(kOperandsBegin, kBeginThreads);
      barrier_arrive(kScalesBegin, kBeginThreads);
    }
  } else if (warp >= kScaleWarp) {
    join_cluster();
    produce_scales(smem, map_sfa, params);
  } else {
    join_cluster();
    produce_operands(smem, maps_a, map_b, params);
  }

  // Peers that multicast still send arrivals here: no one leaves before all are done. Split-k needs
  // no such end, because every CTA waits for all that is sent to it.
  if constexpr (kMulticast > 1) {
    barrier_cluster_arrive();
    barrier_cluster_wait();
  }
}
