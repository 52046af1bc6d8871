#include "csrc/gemm/tensor_maps.h"

namespace dg {

TensorMapSpecs MakeTensorMapSpecs(const GemmProblem& problem, const GemmConfig& config,
                                  int64_t padded_m) {
  const int64_t m = problem.m, n = problem.n, k = problem.k;
  const SmemLayout smem = config.smem();
  // With multicast each CTA loads its share of the rows for the whole cluster.
  const int a_rows = config.block_m / config.cluster_n;
  const int b_rows = config.block_n / config.cluster_m;
  // The narrowest D box is 8 columns = 16 bytes, which needs no swizzle.
  const int d_bytes = smem.store_cols() * 2;
  TensorMapSpecs specs;
  specs.a = {1, k, m, k, kBlockK, a_rows, kBlockK};
  specs.b = {1, k, n, k, kBlockK, b_rows, kBlockK};
  specs.sfa = {4, padded_m, KBlocks(problem), padded_m * 4, config.block_m, 1, 0};
  specs.d = {2, n, m, n * 2, smem.store_cols(), smem.store_rows(), d_bytes > 16 ? d_bytes : 0};
  return specs;
}

}  // namespace dg
