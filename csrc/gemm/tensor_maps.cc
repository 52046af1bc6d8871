#include "csrc/gemm/tensor_maps.h"

namespace dg {

TensorMapSpecs MakeTensorMapSpecs(const GemmProblem& problem, const GemmConfig& config) {
  const int64_t m = problem.m, n = problem.n, k = problem.k;
  const SmemLayout smem = config.smem();
  // With multicast each CTA loads its share of the rows for the whole cluster.
  const int a_rows = config.block_m / config.cluster_n;
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
