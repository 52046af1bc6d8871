// Which output tiles a CTA computes, in which order, and over which part of k. Each producer asks
// for one tile after the other; the operand warp tells the math warpgroups what they need to
// know, beside the ring (TileSlot).
//
// The grid is persistent: cluster c computes tiles c, c + C, c + 2C, ... of C clusters at work.
// Tiles are numbered so that those in flight at the same time form a compact rectangle of D: down
// a swath of kRasterM tile rows first, then to the next column. Its A rows and B columns are what
// L2 has to hold.
#pragma once

namespace dg {

constexpr int kClusterSize = config::kClusterM * config::kClusterN * config::kClusterK;
constexpr int kColumnsPerCluster = config::kBlockN * config::kClusterN;
constexpr int kTileColumns = (config::kN + kColumnsPerCluster - 1) / kColumnsPerCluster;
constexpr int kKBlocks = (config::kK + kBlockK - 1) / kBlockK;

struct Tile {
  int m;     // first row of A and D
  int n;     // first column of D
  int rows;  // rows from m on that D takes; may be more than the tile has, or none
  TileKind kind;
  // The producers alone know the rest.
  int group;   // matrix of B
  int column;  // of tiles; CTAs that share A count as one
};

// Whether some of the clusters that were launched take no tile; of a dense problem's none were
// launched that should not.
constexpr bool kLeavesSmsIdle =
    kGrouping != Grouping::kDense &&
    leaves_sms_idle(config::kBlockM, config::kBlockN, config::kClusterM, kKBlocks);

// Members are called by whole warps.
class Scheduler {
 public:
  __device__ explicit Scheduler(const KernelParams& params)
      : row_tiles_(params),
        multiply_tiles_(row_tiles_.multiply_count() * kTileColumns),
        cluster_(blockIdx.x / kClusterSize),
        clusters_(gridDim.x / kClusterSize),
        stride_(clusters_) {
    const int rank = kClusterSize > 1 ? blockIdx.x % kClusterSize : 0;
    m_in_cluster_ = config::kClusterM > 1 ? rank * config::kBlockM : 0;
    n_in_cluster_ = config::kClusterN > 1 ? rank * config::kBlockN : 0;
    if (kLeavesSmsIdle && multiply_tiles_ > 0) {
      const int rounds = ceil_div(multiply_tiles_, clusters_);
      stride_ = ceil_div(multiply_tiles_, rounds);
    }
    next_ = cluster_ < stride_ ? cluster_ : multiply_tiles_;
  }

  // Tiles of this CTA that multiply. They come first.
  __device__ int multiply_count() const {
    const int left = multiply_tiles_ - next_;
    if (left <= stride_) return left > 0 ? 1 : 0;
    return quotient(left - 1, stride_) + 1;
  }

  __device__ Tile next() {
    if (next_ < multiply_tiles_) {
      const int index = next_;
      next_ += stride_;
      return tile(index, 0, row_tiles_.multiply_count());
    }
    if constexpr (kGrouping == Grouping::kDense) {
      return {0, 0, 0, kStop, 0, 0};
    } else {
      // Tiles of zeros: all clusters share them.
      const int index = cluster_;
      cluster_ += clusters_;
      return tile(index, row_tiles_.multiply_count(), row_tiles_.count());
    }
  }

 private:
  // The index-th tile of the row tiles from `begin` to `end`.
  __device__ Tile tile(int index, int begin, int end) {
    if constexpr (kGrouping == Grouping::kDense) {
      // All rows of tiles in one swath, as in decode: less arithmetic before the first load.
      if (end == 1) return tile_at(0, 0, index);
      if (end <= config::kRasterM) {
        const int column = quotient(index, end);
        return tile_at(0, index - column * end, column);
      }
    }
    constexpr uint32_t kSwathRows = config::kRasterM;
    constexpr uint32_t kTilesPerSwath = kSwathRows * kTileColumns;
    const int swath = static_cast<uint32_t>(index) / kTilesPerSwath;
    const int in_swath = static_cast<uint32_t>(index) % kTilesPerSwath;
    const int first_row = begin + swath * config::kRasterM;
    const int rows = min(config::kRasterM, end - first_row);
    // The last swath may be lower than the others; its tiles past the end are those whose column
    // does not exist.
    const int column = rows == config::kRasterM ? static_cast<uint32_t>(in_swath) / kSwathRows
                       : rows <= 0              ? kTileColumns
                                                : quotient(in_swath, rows);
    if (column >= kTileColumns) return {0, 0, 0, kStop, 0, 0};
    return tile_at(first_row, in_swath - column * rows, column);
  }

  // The tile of row tile `first_row` + `index`.
  __device__ Tile tile_at(int first_row, int index, int column) {
    const RowTile row_tile = row_tiles_.get(first_row, index);
    return {row_tile.m + m_in_cluster_,
            column * kColumnsPerCluster + n_in_cluster_,
            row_tile.rows - m_in_cluster_,
            row_tile.kind,
            row_tile.group,
            column};
  }

  RowTiles row_tiles_;
  int multiply_tiles_;  // of all clusters
  int cluster_;         // this one; then its next tile of zeros
  int clusters_;
  int stride_;
  int next_ = 0;
  int m_in_cluster_;
  int n_in_cluster_;
};

// The k-blocks of this CTA (all, or its share under split-k) and the order it takes them in.
//
// Where one row of tiles covers all rows, all CTAs read the same rows of A. In step, they ask for
// the same lines at the same time. What the SMs of one GPC ask for together, L2 seems to deliver
// once; but the few L2 slices that hold those lines set the pace. CTAs are handed out GPC by GPC.
// So if every column of tiles starts elsewhere in k and wraps around, those of a GPC still are
// close together: up to 4 % for a whole k. Clusters are dealt out to the GPCs by turns, and a GPC's
// columns would be far apart: under split-k that cost up to a third of the time. There all columns
// start at one place or, where tiles are narrow, so that more CTAs ask for A more often, at two.
// (Clusters that share B or A rotate as CTAs do: they are not what selection takes here.)
//
// With more rows of tiles, CTAs in step is what lets them share B and A through L2. With many
// groups, it is what lets memory stream B: rotation costs 2 % there.
class KRange {
 public:
  __device__ KRange() : begin_(0), count_(kKBlocks) {
    if constexpr (config::kClusterK > 1) {
      const int rank = cluster_ctarank();
      begin_ = kKBlocks * rank / config::kClusterK;
      count_ = kKBlocks * (rank + 1) / config::kClusterK - begin_;
    }
  }

  __device__ int count() const { return count_; }

  // The first k-block of a tile of a matrix of `rows` rows, and the one that follows another.
  __device__ int first(const Tile& tile, int rows) const {
    if (!kRotates || rows > kRowsPerCluster) return begin_;
    if constexpr (config::kClusterK > 1) {
      constexpr bool kTwoPlaces = config::kBlockN <= 32;
      return kTwoPlaces && tile.column >= kTileColumns / 2 ? begin_ + count_ / 2 : begin_;
    } else {
      return begin_ + static_cast<uint32_t>(tile.column) * count_ / kTileColumns;
    }
  }
  __device__ int next(int block) const {
    ++block;
    return kRotates && block == begin_ + count_ ? begin_ : block;
  }

  // Taller tiles are for matrices with many rows.
  static constexpr bool kRotates = config::kRotatesK && kRowsPerCluster <= 128;

 private:
  int begin_;
  int count_;
};

}  // namespace dg
