// What kernel.cc says of the kernel that it was compiled for.
#pragma once

namespace dg {
struct KernelParams;
struct TensorMap;
}  // namespace dg

namespace emulator {

struct Kernel {
  int grouping;
  int n;
  int k;
  int block_m;
  int block_n;
  int num_stages;
  int math_warpgroups;
  int cluster_m;
  int cluster_n;
  int cluster_k;
  int raster_m;
  bool batch_invariant;
  bool has_parts;
  bool streams_only;
  // As the device code counts them.
  int threads;
  int smem_bytes;
};

extern const Kernel kKernel;

// One thread's way through it; `a`: as many as it takes.
void RunThread(const dg::TensorMap* a, const dg::TensorMap& b, const dg::TensorMap& sfa,
               const dg::TensorMap& d, const dg::KernelParams& params);

}  // namespace emulator
