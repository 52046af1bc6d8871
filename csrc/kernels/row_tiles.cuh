// Row tiles: how the rows of A are cut into pieces of kBlockM that one matrix of B applies to.
//
// Dense: equal pieces. Grouped: the cut follows numbers in device memory, so nothing on the host
// knows how many pieces there are. Rows come in runs (of one group, or of rows that become zero),
// and every run is cut on its own. The producer warps look them up, 32 runs (a page) at a time, one
// for each lane:
//
//   once     a pass over all pages counts row tiles; of every page, or every few, a lane keeps how
//            many row tiles and rows lie before it
//   a swath  its first page is found among those; the page's runs are read again and counted by a
//            scan, and lane i takes row tile i of the swath from the run that holds it. The swath's
//            other columns take it from the lane.
//
// A swath costs a few dozen shuffles and one load that waits, which is less time than the ring's
// stages keep the tensor cores busy for.
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

// a / b for a >= 0 and b >= 1 that are not known at compile time. A division is a chain of two
// dozen instructions, 150 cycles in front of a kernel's first load; powers of two are most common.
__device__ __forceinline__ int quotient(int a, int b) {
  if ((b & (b - 1)) == 0) return a >> (31 - __clz(b));
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// --- Runs of the groupings -----------------------------------------------------------------------
//
// `read(run)` is what device memory says of a run; the rest computes with that. Where kRowsMove, a
// run's first row, `start`, is the sum of `rows` of those before it; other groupings lay runs out
// at fixed places.

// Group g: the first masked_m[g] of its max_m rows. The rest become zero after all groups, or stay.
class MaskedRuns {
 public:
  __device__ explicit MaskedRuns(const KernelParams& params)
      : counts_(params.groups),
        groups_(params.num_groups),
        max_m_(params.max_m),
        fill_zero_(params.fill_zero) {}

  using Number = int;  // the group's rows that count
  static constexpr bool kRowsMove = false;

  __device__ int count() const { return fill_zero_ ? 2 * groups_ : groups_; }
  __device__ bool multiplies(int run) const { return run < groups_; }
  __device__ int first_row() const { return 0; }

  __device__ Number read(int run) const {
    return max(0, min(counts_[run < groups_ ? run : run - groups_], max_m_));
  }
  __device__ int tiles(int run, Number valid, int) const {
    return ceil_div(length(run, valid), config::kBlockM);
  }

  __device__ RowTile tile(int run, Number valid, int, int index) const {
    const bool rest = run >= groups_;
    const int group = rest ? run - groups_ : run;
    const int skipped = index * config::kBlockM;
    const int rows = length(run, valid);
    return {group * max_m_ + (rest ? valid : 0) + skipped, rows - skipped, group,
            rest ? kZero : kMultiply};
  }

 private:
  __device__ int length(int run, int valid) const { return run < groups_ ? valid : max_m_ - valid; }

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

  using Number = int;  // the group's size; 0 for the two runs behind the groups
  static constexpr bool kRowsMove = true;

  __device__ int count() const { return groups_ + 2; }
  __device__ bool multiplies(int run) const { return run < groups_; }
  __device__ int first_row() const { return first_row_; }

  __device__ Number read(int run) const { return run < groups_ ? size(offset_ + run) : 0; }
  __device__ int rows(int, Number size) const { return size; }
  __device__ int tiles(int run, Number size, int start) const {
    return ceil_div(length(run, size, start), config::kBlockM);
  }

  __device__ RowTile tile(int run, Number size, int start, int index) const {
    const int skipped = index * config::kBlockM;
    const int rows = length(run, size, start);
    const int first = run == groups_ + 1 ? 0 : start;
    return {first + skipped, rows - skipped, run, run < groups_ ? kMultiply : kZero};
  }

 private:
  // Sizes are the user's: negative ones count as none, and no sum exceeds m.
  __device__ int size(int i) const {
    return i >= 0 && i < num_sizes_ ? max(0, min(sizes_[i], m_)) : 0;
  }
  __device__ int length(int run, int size, int start) const {
    if (run < groups_) return saturating_add(start, size, m_) - start;
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

  struct Number {  // block_groups of the window's first and last block
    int first;
    int last;
  };
  static constexpr bool kRowsMove = false;

  __device__ int count() const { return 2 * windows_; }
  __device__ bool multiplies(int run) const { return run < windows_; }
  __device__ int first_row() const { return 0; }

  __device__ Number read(int run) const {
    const int first = window(run) * kBlocks;
    return {block(first), block(first + kBlocks - 1)};
  }

  __device__ int tiles(int run, Number blocks, int) const {
    const bool grouped = max(blocks.first, blocks.last) >= 0;
    if (grouped != multiplies(run)) return 0;
    if (splits(blocks)) return 2;
    return ceil_div(min(kWindow, m_ - window(run) * kWindow), config::kBlockM);
  }

  __device__ RowTile tile(int run, Number blocks, int, int index) const {
    const bool split = splits(blocks);
    const int height = split ? kContiguousAlignment : config::kBlockM;
    const int m = window(run) * kWindow + index * height;
    const int first = split && index == 1 ? blocks.last : blocks.first;
    const int last = split ? first : blocks.last;
    // -1 is odd as well: beside a block with a group, one without is padding.
    const bool mask = ((first | last) & 1) != 0;
    const TileKind kind = !multiplies(run) ? kZero : mask ? kMultiplyMask : kMultiply;
    return {m, min(height, m_ - m), max(first, last) >> 1, kind};
  }

 private:
  static constexpr int kWindow =
      config::kBlockM > kContiguousAlignment ? config::kBlockM : kContiguousAlignment;
  static constexpr int kBlocks = kWindow / kContiguousAlignment;
  static_assert(kBlocks <= 2, "a window has one block or two");

  __device__ int window(int run) const { return run < windows_ ? run : run - windows_; }
  // -1 past the end.
  __device__ int block(int i) const {
    return i * kContiguousAlignment < m_ ? block_groups_[i] : -1;
  }
  __device__ static bool splits(Number blocks) {
    return blocks.first >= 0 && blocks.last >= 0 && blocks.first >> 1 != blocks.last >> 1;
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
    return {m, m_ - m, 0, kMultiply};
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
    kind_ = tile.kind;
  }

  __device__ RowTile get(int index) const {
    return {__shfl_sync(0xffffffff, m_, index), __shfl_sync(0xffffffff, rows_, index),
            __shfl_sync(0xffffffff, group_, index),
            static_cast<TileKind>(__shfl_sync(0xffffffff, kind_, index))};
  }

 private:
  int first_ = -1;
  int m_ = 0;
  int rows_ = 0;
  int group_ = 0;
  int kind_ = 0;
};

__device__ __forceinline__ int from_lane(int number, int lane) {
  return __shfl_sync(0xffffffff, number, lane);
}
__device__ __forceinline__ ContiguousRuns::Number from_lane(ContiguousRuns::Number number,
                                                            int lane) {
  return {from_lane(number.first, lane), from_lane(number.last, lane)};
}

// The search described at the top.
template <typename Runs>
class SearchedRowTiles {
 public:
  __device__ explicit SearchedRowTiles(const KernelParams& params)
      : runs_(params), m_(params.m), count_(0), multiply_count_(0) {
    const int pages = ceil_div(runs_.count(), 32);
    pages_per_lane_ = ceil_div(pages, 32);
    int rows = runs_.first_row();
    typename Runs::Number number = read(0);
#pragma unroll 1
    for (int page = 0, keeper = 0, kept = 0; page < pages; ++page) {
      const typename Runs::Number ahead = read(page + 1);  // under way while this page is counted
      if (kept == 0 && laneid() == keeper) {
        tiles_before_ = count_;
        start_ = rows;
      }
      if (++kept == pages_per_lane_) {
        kept = 0;
        ++keeper;
      }
      const Run run = locate(page, number, rows);
      count_ += __reduce_add_sync(0xffffffff, run.tiles);
      multiply_count_ += __reduce_add_sync(0xffffffff, runs_.multiplies(run.index) ? run.tiles : 0);
      number = ahead;
    }
  }

  __device__ int count() const { return count_; }
  // Row tiles that multiply; they come first.
  __device__ int multiply_count() const { return multiply_count_; }

  __device__ RowTile get(int first, int index) {
    if (!cache_.holds(first)) cache_.keep(first, find(first));
    return cache_.get(index);
  }

 private:
  struct Run {
    int index;
    int start;  // first row
    int tiles;
  };

  // What is to be read of this lane's run of a page.
  __device__ typename Runs::Number read(int page) const {
    return runs_.read(min(page * 32 + laneid(), runs_.count() - 1));
  }

  // This lane's run of a page whose first row is `rows`, which becomes the next page's.
  __device__ Run locate(int page, typename Runs::Number number, int& rows) const {
    const int index = page * 32 + laneid();
    const bool exists = index < runs_.count();
    int start = 0;
    if constexpr (Runs::kRowsMove) {
      int total;
      start = exclusive_scan(exists ? runs_.rows(index, number) : 0, m_, total);
      start = saturating_add(rows, start, m_);
      rows = saturating_add(rows, total, m_);
    }
    return {index, start, exists ? runs_.tiles(index, number, start) : 0};
  }

  // Row tile `first` + i for lane i of a swath.
  __device__ RowTile find(int first) const {
    const int t = min(first + min(laneid(), config::kRasterM - 1), count_ - 1);
    // The last one that keeps a page which begins at or before the swath.
    const int keeper = 31 - __clz(__ballot_sync(0xffffffff, tiles_before_ <= first));
    int before = from_lane(tiles_before_, keeper);
    int rows = from_lane(start_, keeper);
    RowTile found = {};
    bool missing = true;
#pragma unroll 1
    for (int page = keeper * pages_per_lane_; __any_sync(0xffffffff, missing); ++page) {
      const typename Runs::Number number = read(page);
      const Run run = locate(page, number, rows);
      int total;
      const int begin = before + exclusive_scan(run.tiles, kNoLimit, total);
      int lane = 0;  // of the page's last run that begins at or before t
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        if (from_lane(begin, lane + step) <= t) lane += step;
      }
      const RowTile tile = runs_.tile(page * 32 + lane, from_lane(number, lane),
                                      from_lane(run.start, lane), t - from_lane(begin, lane));
      before += total;
      if (missing && t < before) {
        found = tile;
        missing = false;
      }
    }
    return found;
  }

  Runs runs_;
  int m_;
  int count_;
  int multiply_count_;
  int pages_per_lane_;
  // Before the first of the pages that this lane keeps.
  int tiles_before_ = kNoLimit;
  int start_ = 0;
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
