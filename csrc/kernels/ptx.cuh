// One function per PTX instruction, named after it. "memory" clobbers mark those that order
// memory. References are to the PTX ISA, "Instruction set".
#pragma once

namespace dg {

using uint32_t = unsigned int;
using uint64_t = unsigned long long;

// A CUtensorMap: 128 opaque bytes that the host encodes.
struct alignas(64) TensorMap {
  char bytes[128];
};

// --- Threads and control -------------------------------------------------------------------------

// True in exactly one lane of a converged warp. The compiler knows that the branch is uniform, so
// TMA instructions behind it need no loop over active lanes.
__device__ __forceinline__ bool elect_sync() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
               : "=r"(elected));
  return elected != 0;
}

// Volatile: read where it is used, so that what follows from it does not occupy registers
// elsewhere.
__device__ __forceinline__ int laneid() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ uint32_t cluster_ctarank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// CTA barrier `id` over `threads` threads: arrive and wait, or arrive alone.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Cluster barrier. The relaxed arrive orders nothing by itself: pair it with a fence.
__device__ __forceinline__ void barrier_cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// --- Shared memory -------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same shared-memory offset in CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t mapa(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ float ld_shared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// The same if `condition` holds; without a branch, behind which ptxas would take lanes for
// diverged.
__device__ __forceinline__ void ld_shared_if(bool condition, float& value, uint32_t address) {
  asm volatile(
      "{ .reg .pred p;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "@p ld.shared.f32 %0, [%2]; }"
      : "+f"(value)
      : "r"(static_cast<uint32_t>(condition)), "r"(address)
      : "memory");
}

__device__ __forceinline__ int ld_shared_s32(uint32_t address) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void st_shared_s32(uint32_t address, int value) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ float4 ld_shared_v4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ int4 ld_shared_v4_s32(uint32_t address) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// The thread that elect_sync elects stores, without a branch. What it arrives with later, elected
// again, publishes that: the leader of the same lanes is always the same.
__device__ __forceinline__ void st_shared_v4_s32_elect(uint32_t address, int4 v) {
  asm volatile(
      "{.reg .pred p; elect.sync _|p, 0xffffffff;\n"
      "@p st.shared.v4.s32 [%0], {%1, %2, %3, %4};}" ::"r"(address),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}

__device__ __forceinline__ void st_global_v4_s32(void* address, int4 v) {
  asm volatile("st.global.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Stores 16 bytes into another CTA's shared memory; they count as arrived bytes on `barrier` there.
__device__ __forceinline__ void st_async_v4(uint32_t remote_address, float x, float y, float z,
                                            float w, uint32_t remote_barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(remote_address),
      "f"(x), "f"(y), "f"(z), "f"(w), "r"(remote_barrier)
      : "memory");
}

// Four (two) 8x8 matrices of b16; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                                            uint32_t r3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
      : "memory");
}

__device__ __forceinline__ void stmatrix_x2(uint32_t address, uint32_t r0, uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared::cta.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(r0), "r"(r1)
               : "memory");
}

// Two floats to packed bf16, round to nearest even; `low` is the lower half (the first column).
__device__ __forceinline__ uint32_t cvt_bf16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Makes this thread's shared-memory writes visible to TMA and wgmma (the async proxy).
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- mbarrier ------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barrier initialisation visible to the async proxy and to the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Bytes to wait for, before the arrival that the phase cannot end without.
__device__ __forceinline__ void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// NOTE: the default semantics (release at CTA scope) cost one instruction; asking for cluster scope
// adds a MEMBAR.ALL.GPU that made a streaming kernel 2 to 5 times slower. An arrival that frees a
// ring slot for a peer does without: the peer writes A and B, which completed wgmma have read.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t remote_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote_barrier) : "memory");
}

// Whether the phase with this parity has completed; does not wait.
__device__ __forceinline__ bool mbarrier_test_wait(uint32_t barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{ .reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p; }"
      : "=r"(complete)
      : "r"(barrier), "r"(parity)
      : "memory");
  return complete != 0;
}

// Blocks until the phase with this parity has completed. A fresh barrier is in phase 0, so waiting
// for parity 1 on it returns at once.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred p;\n"
      "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra WAIT; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The same, acquiring what other CTAs of the cluster wrote before their arrival.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred p;\n"
      "WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra WAIT; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- TMA -----------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads the map's box at (x, y) into shared memory; its bytes, out-of-bounds zeros included, count
// on `barrier`. x is the contiguous dimension.
__device__ __forceinline__ void tma_load_2d(uint32_t smem, const TensorMap& map, uint32_t barrier,
                                            int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// The same into every CTA of the cluster whose bit is set in `mask`: the data and the barrier's
// byte count land at the same offsets in each.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t smem, const TensorMap& map,
                                                      uint32_t barrier, int x, int y,
                                                      unsigned short mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(mask)
      : "memory");
}

// Copies 4 bytes; cp_async_mbarrier_arrive tells when they are there.
__device__ __forceinline__ void cp_async_4(uint32_t smem, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem), "l"(source) : "memory");
}

// Arrives on `barrier` once all of this thread's cp.async have completed. `noinc`: the arrival is
// one of those that the barrier was initialised to expect.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Stores a box from shared memory at (x, y); what lies past the tensor's upper bounds is dropped.
__device__ __forceinline__ void tma_store_2d(const TensorMap& map, uint32_t smem, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(smem), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's store groups still read shared memory.
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// --- wgmma (the instruction itself is generated for its N: csrc/gemm/kernel_source.cc) -----------

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Matrix descriptor of a K-major fp8 tile with 128-byte swizzle (PTX ISA, "Matrix descriptor
// format"). Bits 13-0: address / 16. Bits 45-32: stride between groups of 8 rows, 1024 bytes / 16.
// Bits 63-62: 1 = 128-byte swizzle. The leading offset is unused when a row is one swizzle row.
// Only the low word depends on the address. It is masked to 18 bits, because in a cluster the
// address' upper byte is the CTA's rank; moving by `bytes` adds bytes / 16 and cannot carry.
__device__ __forceinline__ uint32_t wgmma_descriptor_low(uint32_t smem) {
  return (smem & 0x3FFFF) >> 4;
}
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t low) {
  return 0x4000004000000000ull | low;
}

// Keeps accesses to accumulators on their side of the wgmma instructions around.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

}  // namespace dg
