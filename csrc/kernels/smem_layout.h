// Shared-memory layout of the GEMM kernel, and the tile geometry it follows from.
//
// Compiled twice: by the host (csrc/gemm: launch size, legality) and by the device compiler
// (gemm.cuh: offsets). Every size exists once, here. Plain C++17 without includes, because the
// device side has no standard library.
//
//   offset 0   A ring        num_stages x [block_m rows x 128 bytes], 128-byte swizzle
//              B ring        num_stages x [block_n rows x 128 bytes], 128-byte swizzle
//              D staging     math_warpgroups x waves x [store_rows x warpgroup_n] bf16, in boxes
//                            of store_cols columns, swizzled by the width of a box's row
//              partials      math_warpgroups x (cluster_k - 1) x [store_rows x warpgroup_n] f32
//              SFA ring      num_stages x [block_m] f32
//              SFB ring      num_stages x [4] f32
//              tiles         (num_stages + 1) x [4] i32: what the math warps know of a tile
//              barriers      full and empty per stage; with split-k one per math warp
//              tile count    i32: tiles of this CTA that multiply
#pragma once

namespace dg {

// The largest dynamic shared memory of one block on sm_90: 228 KiB per SM less 1 KiB the system
// keeps (CUDA programming guide, technical specifications of compute capability 9.0).
constexpr int kMaxSmemBytes = 227 * 1024;

// One k-block: 128 values of k share a scale, and 128 fp8 values are one 128-byte swizzle row.
constexpr int kBlockK = 128;

// Rows of one wgmma instruction.
constexpr int kWgmmaM = 64;

// Threads of a warpgroup, the unit that issues wgmma.
constexpr int kWarpgroupThreads = 128;

// Accumulator registers per thread (running totals of all waves and wgmma results) that leave room
// for addresses and scales: 232 registers per thread beside a producer, 255 alone.
constexpr int kMaxAccumulators = 192;

constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

// How a tile is cut over math warpgroups, and where its parts lie in shared memory.
struct SmemLayout {
  int block_m;
  int block_n;
  int num_stages;
  int math_warpgroups;
  int cluster_k;

  // Warpgroups split the rows of a tile while there are 64 for each, its columns otherwise; its
  // columns, too, where 64 rows are too long for registers: both waves then, of half the width.
  constexpr bool splits_rows() const {
    if (block_m < kWgmmaM * math_warpgroups) return false;
    return accumulators(block_m / math_warpgroups, block_n) <= kMaxAccumulators || block_m > 128;
  }
  constexpr int warpgroup_m() const { return splits_rows() ? block_m / math_warpgroups : block_m; }
  constexpr int warpgroup_n() const { return splits_rows() ? block_n : block_n / math_warpgroups; }

  // A warpgroup works through its rows in waves of 64: one wgmma accumulator serves all of them.
  constexpr int waves() const { return warpgroup_m() / kWgmmaM; }

  // Registers of a thread whose warpgroup has so much of a tile: totals, and one wgmma's result.
  static constexpr int accumulators(int rows, int columns) {
    return (rows / kWgmmaM + 1) * columns / 2;
  }
  constexpr int accumulators() const { return accumulators(warpgroup_m(), warpgroup_n()); }

  // With a second set of accumulators the next wgmma runs while the last one's result is promoted.
  // Where its registers do not fit beside the totals, the other warpgroup has to fill the gap.
  constexpr bool overlaps_promotion() const {
    return accumulators() + warpgroup_n() / 2 <= kMaxAccumulators;
  }

  // A lone wave's next wgmma is queued before the last one is done: two stages are in use.
  constexpr bool queues() const { return waves() == 1 && overlaps_promotion(); }

  // Columns between which B's scale may change. Tiles start at multiples of their width, so a
  // border between blocks of 128 falls only on multiples of this.
  constexpr int scale_granule(int columns) const { return gcd(gcd(block_n, columns), 128); }

  // Blocks of 128 that so many columns can touch, at the worst start.
  constexpr int scale_blocks(int columns) const {
    return (128 - scale_granule(columns) + columns - 1) / 128 + 1;
  }

  // Copies of the main loop, each for warpgroups whose columns begin at another place in a block of
  // 128: they know which scale a column has. One loop for all chooses between the additions, and
  // where two warpgroups promote by turns there is no time to spare for that: 128x160 tiles took 2
  // % longer, 128x176 ones 8 %. Where promotion overlaps, or a tile has few k-blocks, it costs less
  // than copies do.
  constexpr int loops(long long k_blocks) const {
    const int granule = scale_granule(warpgroup_n());
    const bool by_turns = math_warpgroups > 1 && !overlaps_promotion();
    const bool pays = by_turns && k_blocks >= 12 && granule >= 16;
    return pays && scale_blocks(warpgroup_n()) > 1 ? 128 / granule : 1;
  }

  // Rows of a wave that one CTA stores, and the warps that hold them: with split-k each CTA of the
  // cluster owns a slice.
  constexpr int store_rows() const { return kWgmmaM / cluster_k; }
  constexpr int store_warps() const { return 4 / cluster_k; }

  // Columns of one store box: the widest swizzle (64 bf16 = 128 bytes) that divides the tile.
  constexpr int store_cols() const {
    int cols = 64;
    while (warpgroup_n() % cols != 0) cols /= 2;
    return cols;
  }

  constexpr int a_bytes() const { return block_m * kBlockK; }
  constexpr int b_bytes() const { return block_n * kBlockK; }

  constexpr int sfa_bytes() const { return block_m * 4; }
  constexpr int sfb_bytes() const { return 16; }
  constexpr int d_bytes() const { return store_rows() * warpgroup_n() * 2; }
  constexpr int partial_bytes() const { return store_rows() * warpgroup_n() * 4; }

  constexpr int a_offset() const { return 0; }
  constexpr int b_offset() const { return a_offset() + num_stages * a_bytes(); }
  constexpr int d_offset() const { return b_offset() + num_stages * b_bytes(); }
  constexpr int partial_offset() const {
    return d_offset() + math_warpgroups * waves() * d_bytes();
  }
  constexpr int sfa_offset() const {
    return partial_offset() + math_warpgroups * (cluster_k - 1) * partial_bytes();
  }
  constexpr int sfb_offset() const { return sfa_offset() + num_stages * sfa_bytes(); }
  constexpr int tile_offset() const { return sfb_offset() + num_stages * sfb_bytes(); }
  constexpr int barrier_offset() const { return tile_offset() + 16 * (num_stages + 1); }
  constexpr int num_barriers() const {
    return 2 * num_stages + (cluster_k > 1 ? 4 * math_warpgroups : 0);
  }
  constexpr int tile_count_offset() const { return barrier_offset() + 8 * num_barriers(); }
  constexpr int total_bytes() const { return tile_count_offset() + 8; }
};

}  // namespace dg
