// Row tiles: how the rows of A are cut into pieces of kBlockM that one matrix of B applies to.
//
// Dense: equal pieces. Grouped: the cut follows numbers in device memory, so nothing on the host
// knows how many pieces there are. Rows come in runs (of one group, or of rows that become zero),
// every run is cut on its own, and row tile t is looked up by searching the runs' prefix sums:
//
//   once     32 lanes each add up a chunk of ceil(runs / 32) runs; a scan makes prefix sums
//   a swath  lane i looks up row tile first + i: a binary search over the chunks by shuffles, then
//            a walk through one chunk. The swath's other columns take it from the lane.
//
// Up to 32 runs a lane has one at most; of 512 groups it has 17, in each of the two passes that
// make the prefix sums, and walks through as many. Only the producer warp does it, a tile ahead of
// the tensor cores.
//
// Runs that become zero come after all others, so a CTA multiplies first and clears afterwards.
#pragma once

namespace dg {

constexpr Grouping kGrouping = static_cast<Grouping>(config::kGrouping);
constexpr int kRowsPerCluster = config::kBlockM * config::kClusterM;

static_assert(kGrouping == Grouping::kDense || config::kClusterM == 1,
              "CTAs that share B must work on the same group");
static_assert(kGrouping == Grouping::kDense || config::kRasterM <= kMaxGroupedRasterRows,
              "a lane looks up each row tile of a swath");

// Rows may end anywhere in a tile, and what lies behind them is not this tile's to write. Otherwise
// they end with the matrix, where TMA clips.
constexpr bool kRowsEndInTiles = kGrouping == Grouping::kMasked || kGrouping == Grouping::kRagged;

// What a tile asks for.
enum TileKind : int {
  kStop = 0,      // there are no more tiles
  kZero,          // zeros: its rows belong to no group
  kMultiply,      // A times the group's B
  kMultiplyMask,  // the same, but some of its rows belong to no group and become zero
};

struct RowTile {
  int m;      // first row of A and D
  int rows;   // rows from m on that are this tile's; may be more than kRowsPerCluster
  int group;  // matrix of B
  TileKind kind;
  bool alone;  // known to be the only row tile of its group
};

// --- Warp scans ----------------------------------------------------------------------------------

// a + b, but no more than `limit`; none is negative. Two int32 do not overflow a uint32.
__device__ __forceinline__ int saturating_add(int a, int b, int limit) {
  return min(static_cast<uint32_t>(a) + static_cast<uint32_t>(b), static_cast<uint32_t>(limit));
}

// Sums of the lanes below, each sum no more than `limit`; `total` becomes the sum of all.
__device__ __forceinline__ int exclusive_scan(int value, int limit, int& total) {
  const int lane = laneid();
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(0xffffffff, sum, distance);
    if (lane >= distance) sum = saturating_add(sum, below, limit);
  }
  total = __shfl_sync(0xffffffff, sum, 31);
  const int before = __shfl_up_sync(0xffffffff, sum, 1);
  return lane == 0 ? 0 : before;
}

constexpr int kNoLimit = 0x7fffffff;

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// --- Runs of the groupings -----------------------------------------------------------------------
//
// `rows(run)` is what a run moves the next run's first row by; `start` is a run's first row by that
// count, and ignored by groupings that lay runs out at fixed places.

// Group g: the first masked_m[g] of its max_m rows. The rest become zero after all groups, or stay.
class MaskedRuns {
 public:
  __device__ explicit MaskedRuns(const KernelParams& params)
      : counts_(params.groups),
        groups_(params.num_groups),
        max_m_(params.max_m),
        fill_zero_(params.fill_zero) {}

  __device__ int count() const { return fill_zero_ ? 2 * groups_ : groups_; }
  __device__ bool multiplies(int run) const { return run < groups_; }
  __device__ int first_row() const { return 0; }
  __device__ int rows(int) const { return 0; }
  __device__ int tiles(int run, int) const { return ceil_div(length(run), config::kBlockM); }

  __device__ RowTile tile(int run, int, int index) const {
    const bool rest = run >= groups_;
    const int group = rest ? run - groups_ : run;
    const int skipped = index * config::kBlockM + (rest ? valid(group) : 0);
    const int rows = length(run);
    return {group * max_m_ + skipped, rows - index * config::kBlockM, group,
            rest ? kZero : kMultiply, rows <= config::kBlockM};
  }

 private:
  __device__ int valid(int group) const { return max(0, min(counts_[group], max_m_)); }
  __device__ int length(int run) const {
    return run < groups_ ? valid(run) : max_m_ - valid(run - groups_);
  }

  const int* counts_;
  int groups_;
  int max_m_;
  bool fill_zero_;
};

// Groups follow each other. B holds those from group_offset on; the rows behind them, and in front
// of them, become zero.
class RaggedRuns {
 public:
  __device__ explicit RaggedRuns(const KernelParams& params)
      : sizes_(params.groups),
        num_sizes_(params.num_sizes),
        groups_(params.num_groups),
        offset_(max(-params.num_groups, min(*params.detail, params.num_sizes))),
        m_(params.m),
        first_row_(0) {
    if (offset_ > 0) {
      int rows = 0;
      for (int i = laneid(); i < offset_; i += 32) {
        rows = saturating_add(rows, size(i), m_);
      }
      exclusive_scan(rows, m_, first_row_);
    }
  }

  __device__ int count() const { return groups_ + 2; }
  __device__ bool multiplies(int run) const { return run < groups_; }
  __device__ int first_row() const { return first_row_; }
  __device__ int rows(int run) const { return run < groups_ ? size(offset_ + run) : 0; }
  __device__ int tiles(int run, int start) const {
    return ceil_div(length(run, start), config::kBlockM);
  }

  __device__ RowTile tile(int run, int start, int index) const {
    const int skipped = index * config::kBlockM;
    const int rows = length(run, start);
    const int first = run == groups_ + 1 ? 0 : start;
    return {first + skipped, rows - skipped, run, run < groups_ ? kMultiply : kZero,
            rows <= config::kBlockM};
  }

 private:
  // Sizes are the user's: negative ones count as none, and no sum exceeds m.
  __device__ int size(int i) const {
    return i >= 0 && i < num_sizes_ ? max(0, min(sizes_[i], m_)) : 0;
  }
  __device__ int length(int run, int start) const {
    if (run < groups_) return saturating_add(start, size(offset_ + run), m_) - start;
    return run == groups_ ? m_ - start : first_row_;
  }

  const int* sizes_;
  int num_sizes_;
  int groups_;
  int offset_;  // of B's first matrix in group_sizes
  int m_;
  int first_row_;  // of B's first group
};

// Windows as high as a tile and at least a block. Where a window is two blocks, they mostly are of
// one group; if not, it is two tiles of half the height. Windows without a group come again at the
// end, to become zero.
class ContiguousRuns {
 public:
  __device__ explicit ContiguousRuns(const KernelParams& params)
      : block_groups_(params.groups), m_(params.m), windows_(ceil_div(params.m, kWindow)) {}

  __device__ int count() const { return 2 * windows_; }
  __device__ bool multiplies(int run) const { return run < windows_; }
  __device__ int first_row() const { return 0; }
  __device__ int rows(int) const { return 0; }

  __device__ int tiles(int run, int) const {
    const int window = run % windows_;
    const bool grouped = max(block(window, 0), block(window, kBlocks - 1)) >= 0;
    if (grouped != multiplies(run)) return 0;
    if (splits(window)) return 2;
    return ceil_div(min(kWindow, m_ - window * kWindow), config::kBlockM);
  }

  __device__ RowTile tile(int run, int, int index) const {
    const int window = run % windows_;
    const bool split = splits(window);
    const int height = split ? kContiguousAlignment : config::kBlockM;
    const int m = window * kWindow + index * height;
    const int first = block(window, split ? index : 0);
    const int second = split ? first : block(window, kBlocks - 1);
    // -1 is odd as well: beside a block with a group, one without is padding.
    const bool mask = ((first | second) & 1) != 0;
    const TileKind kind = !multiplies(run) ? kZero : mask ? kMultiplyMask : kMultiply;
    return {m, min(height, m_ - m), max(first, second) >> 1, kind, false};
  }

 private:
  static constexpr int kWindow =
      config::kBlockM > kContiguousAlignment ? config::kBlockM : kContiguousAlignment;
  static constexpr int kBlocks = kWindow / kContiguousAlignment;
  static_assert(kBlocks <= 2, "a window has one block or two");

  // block_groups of a window's block, -1 where it lies past the end.
  __device__ int block(int window, int index) const {
    const int i = window * kBlocks + index;
    return i * kContiguousAlignment < m_ ? block_groups_[i] : -1;
  }
  __device__ bool splits(int window) const {
    if (kBlocks == 1) return false;
    const int first = block(window, 0), second = block(window, 1);
    return first >= 0 && second >= 0 && first >> 1 != second >> 1;
  }

  const int* block_groups_;
  int m_;
  int windows_;
};

// --- Row tiles -----------------------------------------------------------------------------------

// Equal pieces, the last one cut by TMA.
class EqualRowTiles {
 public:
  __device__ explicit EqualRowTiles(const KernelParams& params)
      : m_(params.m), count_(ceil_div(params.m, kRowsPerCluster)) {}

  __device__ int count() const { return count_; }
  __device__ int multiply_count() const { return count_; }

  // Row tile `first` + `index`; whole warps.
  __device__ RowTile get(int first, int index) {
    const int m = (first + index) * kRowsPerCluster;
    return {m, m_ - m, 0, kMultiply, count_ == 1};
  }

 private:
  int m_;
  int count_;
};

// Lane i keeps row tile first + i of a swath.
class SwathCache {
 public:
  // Whether `first` is the swath that was kept last.
  __device__ bool holds(int first) const { return first == first_; }

  __device__ void keep(int first, const RowTile& tile) {
    first_ = first;
    m_ = tile.m;
    rows_ = tile.rows;
    group_ = tile.group;
    kind_ = tile.kind * 2 + tile.alone;
  }

  __device__ RowTile get(int index) const {
    const int kind = __shfl_sync(0xffffffff, kind_, index);
    return {__shfl_sync(0xffffffff, m_, index), __shfl_sync(0xffffffff, rows_, index),
            __shfl_sync(0xffffffff, group_, index), static_cast<TileKind>(kind / 2), kind % 2 != 0};
  }

 private:
  int first_ = -1;
  int m_ = 0;
  int rows_ = 0;
  int group_ = 0;
  int kind_ = 0;
};

// The search described at the top.
template <typename Runs>
class SearchedRowTiles {
 public:
  __device__ explicit SearchedRowTiles(const KernelParams& params)
      : runs_(params), m_(params.m), chunk_(ceil_div(runs_.count(), 32)) {
    const int begin = min(laneid() * chunk_, runs_.count());
    const int end = min(begin + chunk_, runs_.count());
    int rows = 0;
    for (int run = begin; run < end; ++run) rows = saturating_add(rows, runs_.rows(run), m_);
    int total;
    start_ = saturating_add(exclusive_scan(rows, m_, total), runs_.first_row(), m_);
    int tiles = 0, multiply_tiles = 0;
    int start = start_;
    for (int run = begin; run < end; ++run) {
      const int run_tiles = runs_.tiles(run, start);
      tiles += run_tiles;
      if (runs_.multiplies(run)) multiply_tiles += run_tiles;
      start = saturating_add(start, runs_.rows(run), m_);
    }
    tiles_before_ = exclusive_scan(tiles, kNoLimit, count_);
    multiply_count_ = __reduce_add_sync(0xffffffff, multiply_tiles);
  }

  __device__ int count() const { return count_; }
  // Row tiles that multiply; they come first.
  __device__ int multiply_count() const { return multiply_count_; }

  __device__ RowTile get(int first, int index) {
    if (!cache_.holds(first)) cache_.keep(first, find(min(first + laneid(), count_ - 1)));
    return cache_.get(index);
  }

 private:
  // Row tile t of this lane.
  __device__ RowTile find(int t) const {
    int chunk = 0;  // the last one that begins at or before t
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      if (__shfl_sync(0xffffffff, tiles_before_, chunk + step) <= t) chunk += step;
    }
    int index = t - __shfl_sync(0xffffffff, tiles_before_, chunk);
    int start = __shfl_sync(0xffffffff, start_, chunk);
    int run = chunk * chunk_;
    for (int tiles; index >= (tiles = runs_.tiles(run, start)); ++run) {
      index -= tiles;
      start = saturating_add(start, runs_.rows(run), m_);
    }
    return runs_.tile(run, start, index);
  }

  Runs runs_;
  int m_;
  int chunk_;         // runs per lane
  int start_;         // first row of this lane's chunk
  int tiles_before_;  // row tiles of the lanes below
  int count_;
  int multiply_count_;
  SwathCache cache_;
};

template <Grouping kWhich>
struct RowTilesOf;
template <>
struct RowTilesOf<Grouping::kDense> {
  using Type = EqualRowTiles;
};
template <>
struct RowTilesOf<Grouping::kContiguous> {
  using Type = SearchedRowTiles<ContiguousRuns>;
};
template <>
struct RowTilesOf<Grouping::kMasked> {
  using Type = SearchedRowTiles<MaskedRuns>;
};
template <>
struct RowTilesOf<Grouping::kRagged> {
  using Type = SearchedRowTiles<RaggedRuns>;
};
using RowTiles = RowTilesOf<kGrouping>::Type;

}  // namespace dg
