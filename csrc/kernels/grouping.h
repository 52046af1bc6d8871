// How rows of A are assigned to weight matrices, and what a launch passes to the kernel.
//
// Compiled twice, like smem_layout.h: by the host, which fills KernelParams, and by the device
// compiler. Plain C++17 without includes, because the device side has no standard library.
#pragma once

namespace dg {

// The operations that the one kernel serves.
enum class Grouping : int {
  kDense = 0,       // one weight matrix
  kContiguous = 1,  // m_indices names each row's matrix; aligned blocks of rows share one
  kMasked = 2,      // max_m rows per matrix, of which the first masked_m[group] count
  kRagged = 3,      // group_sizes[group] consecutive rows each, of any size
};

// Rows of a contiguous layout that belong to the same group: segments start at multiples of it.
constexpr int kContiguousAlignment = 128;

// The tallest swath of tile rows of a grouped operation: a warp's lanes look up one each.
constexpr int kMaxGroupedRasterRows = 32;

// A launch, beside its tensor maps. Pointers are to global memory.
struct KernelParams {
  const float* sfa;   // [ceil(k/128), sfa_pitch]: SFA as it lies in memory, m-contiguous
  const float* sfb;   // [num_groups, ceil(n/128), ceil(k/128)]
  void* d;            // bf16 [m, n]
  const int* groups;  // contiguous: block_groups[ceil(m/128)], -1 or 2 * group + "has padding rows"
                      // masked: masked_m[num_groups]; ragged: group_sizes[num_sizes]
  const int* detail;  // contiguous: m_indices[m]; ragged: group_offset[1]
  int m;              // rows of A and D, of all groups together
  int sfa_pitch;      // m, or m rounded up to a multiple of 4
  int part_rows;      // of A, in a box of a part of a tile, or of every tile (MapsOfA in gemm.cuh)
  int num_groups;     // matrices in B
  int num_sizes;      // ragged: entries of group_sizes, of which B may hold a slice
  int max_m;          // masked: rows per group
  int fill_zero;      // masked: 1 if rows beyond masked_m are to become zero, else 0
};

}  // namespace dg
