// The GEMM kernel of one configuration, compiled for the emulator. "gemm.cuh" is that of a copy of
// csrc/kernels in which this directory's ptx.cuh has replaced the one there
// (tests/cpu/test_emulator.py makes it); the configuration's numbers are macros.

#include "tests/emulator/kernel.h"

#include <algorithm>
#include <iterator>

namespace dg::config {
constexpr int kGrouping = GROUPING, kN = N, kK = K, kBlockM = BLOCK_M, kBlockN = BLOCK_N,
              kNumStages = NUM_STAGES, kMathWarpgroups = MATH_WARPGROUPS, kClusterM = CLUSTER_M,
              kClusterN = CLUSTER_N, kClusterK = CLUSTER_K, kRasterM = RASTER_M,
              kArrivalsPerWarp = ARRIVALS_PER_WARP;
constexpr bool kHasParts = HAS_PARTS;
constexpr bool kStreamsOnly = STREAMS_ONLY;
constexpr bool kRotatesK = GROUPING == 0 && !BATCH_INVARIANT;
}  // namespace dg::config

#define DG_KERNEL_NAME gemm_kernel
#include "gemm.cuh"

namespace emulator {

const Kernel kKernel = {
    GROUPING,
    N,
    K,
    BLOCK_M,
    BLOCK_N,
    NUM_STAGES,
    MATH_WARPGROUPS,
    CLUSTER_M,
    CLUSTER_N,
    CLUSTER_K,
    RASTER_M,
    BATCH_INVARIANT,
    HAS_PARTS,
    STREAMS_ONLY,
    dg::kThreads,
    dg::kLayout.total_bytes(),
};

void RunThread(const dg::TensorMap* a, const dg::TensorMap& b, const dg::TensorMap& sfa,
               const dg::TensorMap& d, const dg::KernelParams& params) {
  dg::MapsOfA maps;
  std::copy_n(a, std::size(maps.map), maps.map);
  gemm_kernel(maps, b, sfa, d, params);
}

}  // namespace emulator
