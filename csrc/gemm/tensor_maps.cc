#include "csrc/gemm/tensor_maps.h"

#include <algorithm>
#include <limits>

namespace dg {
namespace {

// Rows of A in the box that parts of tiles are copied by. Rows that a tile does not have cost time:
// past the end of A, TMA fills in zeros, at 8 cycles a row where one that it copies takes 3. More
// boxes cost time, too: with four of them tiles of 64 rows took 16 % longer than with one or two.
int PartRows(const GemmProblem& problem, const GemmConfig& config) {
  switch (problem.grouping) {
    case Grouping::kDense: {
      // The last row of tiles has no other number of rows.
      const int64_t rows = problem.m % config.block_m;
      return rows == 0 ? config.block_m : static_cast<int>(rows);
    }
    case Grouping::kContiguous:
      // A tile's blocks may be of different groups.
      return std::min(config.block_m, kContiguousAlignment);
    case Grouping::kMasked:
    case Grouping::kRagged:
      return RowsPerGroup(problem) > config.block_m / 4 ? config.block_m / 2 : config.block_m / 4;
  }
  return config.block_m;
}

}  // namespace

bool HasParts(const GemmProblem& problem, const GemmConfig& config) {
  if (config.cluster_n > 1) return false;
  switch (problem.grouping) {
    case Grouping::kDense:
      return problem.m > config.block_m && problem.m % config.block_m != 0;
    case Grouping::kContiguous:
      return config.block_m > kContiguousAlignment;
    case Grouping::kMasked:
    case Grouping::kRagged:
      return true;
  }
  return true;
}

TensorMapSpecs MakeTensorMapSpecs(const GemmProblem& problem, const GemmConfig& config,
                                  bool has_parts, int64_t sfa_pitch) {
  const int64_t m = problem.m, n = problem.n, k = problem.k;
  const SmemLayout smem = config.smem();
  // With multicast each CTA loads its share of the rows for the whole cluster.
  const int a_rows = config.block_m / config.cluster_n;
  const int b_rows = config.block_n / config.cluster_m;
  // The narrowest D box is 8 columns = 16 bytes, which needs no swizzle.
  const int d_bytes = smem.store_cols() * 2;
  TensorMapSpecs specs = {};
  specs.part_rows = PartRows(problem, config);
  const auto a = [&](int rows) { return TensorMapSpec{1, k, m, k, kBlockK, rows, kBlockK}; };
  specs.num_a = has_parts ? 2 : 1;
  specs.a[0] = a(has_parts || config.cluster_n > 1 ? a_rows : specs.part_rows);
  if (has_parts) specs.a[1] = a(specs.part_rows);
  // A tile that passes the end of its group's columns reads the next group's rows of B; no one sees
  // what comes of them, because D has no such columns.
  specs.b = {1, k, problem.num_groups * n, k, kBlockK, b_rows, kBlockK};
  // One row, because rows would have to begin at multiples of 16 bytes. Where k-blocks do not, or
  // are more than TMA can count, the kernel does without this map, which has to be one
  // nevertheless.
  const int64_t scales =
      std::min<int64_t>(KBlocks(problem) * sfa_pitch, std::numeric_limits<int32_t>::max());
  const int sfa_rows =
      static_cast<int>(std::min<int64_t>(config.block_m, CeilDiv(sfa_pitch, 4) * 4));
  specs.sfa = {4, scales, 1, CeilDiv(scales, 4) * 16, sfa_rows, 1, 0};
  specs.d = {2, n, m, n * 2, smem.store_cols(), smem.store_rows(), d_bytes > 16 ? d_bytes : 0};
  return specs;
}

}  // namespace dg
