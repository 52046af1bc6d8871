// Which output tiles a CTA computes, in which order. The kernel body asks for one tile after the
// other and does not know how they are laid out; producer and math warpgroups each walk their own
// copy and so agree without talking.
//
// The grid is persistent: cluster c computes tiles c, c + C, c + 2C, ... of C resident clusters.
// Tiles are numbered so that those in flight at the same time form a compact rectangle of D: down
// a swath of kRasterM tile rows first, then to the next column. Its A rows and B columns are what
// L2 has to hold.
#pragma once

namespace dg {

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
    constexpr int kTileColumns = (config::kN + kColumnsPerCluster - 1) / kColumnsPerCluster;
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
  static constexpr int kClusterSize = config::kClusterM * config::kClusterN * config::kClusterK;
  static constexpr int kRowsPerCluster = config::kBlockM * config::kClusterM;
  static constexpr int kColumnsPerCluster = config::kBlockN * config::kClusterN;

  int tile_rows_;
  int next_;
  int stride_;
  int m_in_cluster_;
  int n_in_cluster_;
};

}  // namespace dg
