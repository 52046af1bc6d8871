// Which output tiles a CTA computes, in which order, and over which part of k. The kernel body asks
// for one tile after the other and does not know how they are laid out; producer and math
// warpgroups each walk their own copy and so agree without talking.
//
// The grid is persistent: cluster c computes tiles c, c + C, c + 2C, ... of C resident clusters.
// Tiles are numbered so that those in flight at the same time form a compact rectangle of D: down
// a swath of kRasterM tile rows first, then to the next column. Its A rows and B columns are what
// L2 has to hold.
#pragma once

namespace dg {

constexpr int kClusterSize = config::kClusterM * config::kClusterN * config::kClusterK;
constexpr int kRowsPerCluster = config::kBlockM * config::kClusterM;
constexpr int kColumnsPerCluster = config::kBlockN * config::kClusterN;
constexpr int kTileColumns = (config::kN + kColumnsPerCluster - 1) / kColumnsPerCluster;
constexpr int kKBlocks = (config::kK + kBlockK - 1) / kBlockK;

struct Tile {
  int m;       // first row of D and A, in elements
  int n;       // first column of D, row of B, in elements
  bool valid;  // false past the last tile
};

class Scheduler {
 public:
  __device__ explicit Scheduler(int m)
      : tile_rows_((m + kRowsPerCluster - 1) / kRowsPerCluster),
        next_(blockIdx.x / kClusterSize),
        stride_(gridDim.x / kClusterSize) {
    const int rank = kClusterSize > 1 ? blockIdx.x % kClusterSize : 0;
    m_in_cluster_ = config::kClusterM > 1 ? rank * config::kBlockM : 0;
    n_in_cluster_ = config::kClusterN > 1 ? rank * config::kBlockN : 0;
  }

  __device__ Tile next() {
    constexpr int kTilesPerSwath = config::kRasterM * kTileColumns;
    const int index = next_;
    next_ += stride_;
    const int swath = index / kTilesPerSwath;
    const int in_swath = index % kTilesPerSwath;
    const int first_row = swath * config::kRasterM;
    const int rows = min(config::kRasterM, tile_rows_ - first_row);
    if (rows <= 0) return {0, 0, false};
    // The last swath may be lower than the others; its tiles past the end are those whose column
    // does not exist.
    const int column = in_swath / rows;
    if (column >= kTileColumns) return {0, 0, false};
    return {(first_row + in_swath % rows) * kRowsPerCluster + m_in_cluster_,
            column * kColumnsPerCluster + n_in_cluster_, true};
  }

 private:
  int tile_rows_;
  int next_;
  int stride_;
  int m_in_cluster_;
  int n_in_cluster_;
};

// The k-blocks of this CTA (all, or its share under split-k) and the order it takes them in.
//
// Where one row of tiles covers m, all CTAs read the same rows of A. In step, they would ask for
// the same lines at the same time, and the few L2 slices that hold those would set the pace. So
// every column of tiles starts elsewhere in k and wraps around. (With more rows of tiles, CTAs in
// step is what lets them share B and A through L2.)
class KRange {
 public:
  __device__ explicit KRange(int m)
      : begin_(0), count_(kKBlocks), rotate_(kMayRotate && m <= kRowsPerCluster) {
    if constexpr (config::kClusterK > 1) {
      const int rank = cluster_ctarank();
      begin_ = kKBlocks * rank / config::kClusterK;
      count_ = kKBlocks * (rank + 1) / config::kClusterK - begin_;
    }
  }

  __device__ int count() const { return count_; }

  // The i-th k-block of a tile is block(i, start(tile)).
  __device__ int start(const Tile& tile) const {
    return rotate_ ? tile.n / kColumnsPerCluster * count_ / kTileColumns : 0;
  }
  __device__ int block(int i, int start) const {
    const int rotated = i + start;
    return begin_ + (rotated < count_ ? rotated : rotated - count_);
  }

 private:
  // Taller tiles are for matrices with many rows.
  static constexpr bool kMayRotate = kRowsPerCluster <= 128;

  int begin_;
  int count_;
  bool rotate_;
};

}  // namespace dg
