// Stands in for csrc/kernels/ptx.cuh when the kernels are compiled for the emulator, and for what
// the CUDA compiler declares by itself. machine.cc defines what is only declared here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct int4 {
  int x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace emulator {

struct Index {
  unsigned x;
};
Index ThreadIndex();
Index BlockIndex();
Index GridSize();

}  // namespace emulator

#define threadIdx emulator::ThreadIndex()
#define blockIdx emulator::BlockIndex()
#define gridDim emulator::GridSize()

namespace dg {

using std::max;
using std::min;
using std::uint32_t;
using std::uint64_t;

// Holds a pointer to the emulator::TensorMap that it stands for.
struct alignas(64) TensorMap {
  char bytes[128];
};

// --- Threads and control -------------------------------------------------------------------------

bool elect_sync();
int laneid();
uint32_t cluster_ctarank();
void __syncwarp();
int __shfl_sync(unsigned mask, int value, int source);
int __shfl_up_sync(unsigned mask, int value, int distance);
int __reduce_add_sync(unsigned mask, int value);
unsigned __ballot_sync(unsigned mask, bool value);
bool __any_sync(unsigned mask, bool value);
inline int __clz(unsigned value) { return value == 0 ? 32 : __builtin_clz(value); }
template <int kRegisters>
void setmaxnreg_inc() {}
template <int kRegisters>
void setmaxnreg_dec() {}
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);
void barrier_cluster_arrive_relaxed();
void barrier_cluster_arrive();
void barrier_cluster_wait();

// --- Memory --------------------------------------------------------------------------------------

uint32_t smem_address(const void* pointer);
uint32_t mapa(uint32_t address, uint32_t rank);
float ld_shared(uint32_t address);
inline void ld_shared_if(bool condition, float& value, uint32_t address) {
  if (condition) value = ld_shared(address);
}
int ld_shared_s32(uint32_t address);
void st_shared_s32(uint32_t address, int value);
float4 ld_shared_v4(uint32_t address);
int4 ld_shared_v4_s32(uint32_t address);
void st_shared_v4_s32(uint32_t address, int4 v);
inline void st_shared_v4_s32_elect(uint32_t address, int4 v) {
  if (elect_sync()) st_shared_v4_s32(address, v);
}
void st_global_v4_s32(void* address, int4 v);
void st_async_v4(uint32_t remote_address, float x, float y, float z, float w,
                 uint32_t remote_barrier);
void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3);
void stmatrix_x2(uint32_t address, uint32_t r0, uint32_t r1);
uint32_t cvt_bf16x2(float low, float high);
inline void fence_proxy_async_shared() {}

// --- mbarrier ------------------------------------------------------------------------------------

void mbarrier_init(uint32_t barrier, uint32_t arrivals);
inline void fence_mbarrier_init() {}
void mbarrier_arrive(uint32_t barrier);
void mbarrier_arrive(uint32_t barrier, int arrivals);
void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes);
void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes);
void mbarrier_arrive_remote(uint32_t remote_barrier);
bool mbarrier_test_wait(uint32_t barrier, uint32_t parity);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity);

// --- Asynchronous copies -------------------------------------------------------------------------

inline void prefetch_tensormap(const TensorMap&) {}
void tma_load_2d(uint32_t smem, const TensorMap& map, uint32_t barrier, int x, int y);
void tma_load_2d_multicast(uint32_t smem, const TensorMap& map, uint32_t barrier, int x, int y,
                           unsigned short mask);
void cp_async_4(uint32_t smem, const void* source);
void cp_async_mbarrier_arrive(uint32_t barrier);
void tma_store_2d(const TensorMap& map, uint32_t smem, int x, int y);
void cp_async_bulk_commit_group();
void wait_for_stores();
template <int kPending>
void cp_async_bulk_wait_group_read() {
  static_assert(kPending == 0, "groups of stores are not told apart");
  wait_for_stores();
}

// --- wgmma ---------------------------------------------------------------------------------------

inline void wgmma_fence() {}
void start_wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulates);
template <int kCount>
void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulates) {
  start_wgmma(d, 2 * kCount, a, b, accumulates);
}
void wgmma_commit_group();
void wait_for_wgmma(int pending);
template <int kPending>
void wgmma_wait_group() {
  wait_for_wgmma(kPending);
}
inline uint32_t wgmma_descriptor_low(uint32_t smem) { return (smem & 0x3FFFF) >> 4; }
inline uint64_t wgmma_descriptor(uint32_t low) { return 0x4000004000000000ull | low; }

// Accumulators are in memory: a wgmma writes them while its thread does something else.
template <int kCount>
void pin(float (&registers)[kCount]) {
  asm volatile("" : : "r"(&registers[0]) : "memory");
}

}  // namespace dg
