#include "csrc/gemm/tensor_maps.h"

namespace dg {
namespace {

// Rows of A that one TMA instruction moves: those of a tile, or fewer where its last rows may not
// be there. A power of two, or all of m. See load_operands in gemm.cuh.
int BoxRowsOfA(const GemmProblem& problem, const GemmConfig& config) {
  // With multicast each CTA loads its share of the rows for the whole cluster.
  if (config.cluster_n > 1) return config.block_m / config.cluster_n;
  switch (problem.grouping) {
    case Grouping::kDense: {
      if (problem.m <= config.block_m) return static_cast<int>(problem.m);
      // One tile among many does not count.
      const bool whole = problem.m % config.block_m == 0 || problem.m > 8 * config.block_m;
      return whole ? config.block_m : config.block_m / 4;
    }
    case Grouping::kContiguous:
      return config.block_m;
    case Grouping::kMasked:
    case Grouping::kRagged: {
      int rows = config.block_m / 4;
      while (rows < config.block_m && rows < RowsPerGroup(problem)) rows *= 2;
      return rows;
    }
  }
  return config.block_m;
}

}  // namespace

TensorMapSpecs MakeTensorMapSpecs(const GemmProblem& problem, const GemmConfig& config) {
  const int64_t m = problem.m, n = problem.n, k = problem.k;
  const SmemLayout smem = config.smem();
  const int a_rows = BoxRowsOfA(problem, config);
  const int b_rows = config.block_n / config.cluster_m;
  // The narrowest D box is 8 columns = 16 bytes, which needs no swizzle.
  const int d_bytes = smem.store_cols() * 2;
  TensorMapSpecs specs;
  specs.a = {1, k, m, k, kBlockK, a_rows, kBlockK};
  // A tile that passes the end of its group's columns reads the next group's rows of B; no one sees
  // what comes of them, because D has no such columns.
  specs.b = {1, k, problem.num_groups * n, k, kBlockK, b_rows, kBlockK};
  specs.d = {2, n, m, n * 2, smem.store_cols(), smem.store_rows(), d_bytes > 16 ? d_bytes : 0};
  return specs;
}

}  // namespace dg
