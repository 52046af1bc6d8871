// A cubin made ready to launch: one library for the process, one preparation per device.
//
// csrc/ffi asks for one by its source, calls Prepare when XLA initialises an executable
// on a device and Launch when it executes.
#pragma once

#include <cuda.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "csrc/jit/cubin.h"
#include "csrc/jit/driver.h"
#include "csrc/jit/source.h"

namespace dg::jit {

// A kernel with its launch shape. Its library is unloaded with it, so what may launch it,
// executables and their captured graphs, must own it; XLA keeps an executable until its runs are
// over.
class Kernel {
 public:
  // Device ordinals are below this: the bits of prepared_.
  static constexpr int kMaxDevices = 64;

  // `smem_bytes` is the dynamic shared memory per block, `threads` the block's size, `cluster_size`
  // the blocks per cluster along x (1: no clusters). Touches no driver.
  Kernel(std::shared_ptr<const Cubin> cubin, int smem_bytes, int threads, int cluster_size);

  ~Kernel();

  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  // Throws Error unless a device's ordinal is below kMaxDevices.
  static void CheckOrdinal(int device);

  // Loads the code on a device and raises its shared-memory limit, so that launches, graph capture
  // included, load nothing. Idempotent and safe from many threads; one atomic load once prepared.
  // Throws Error, also when the device is no Hopper GPU.
  void Prepare(int device);

  // How many multiprocessors a prepared device has.
  int NumSms(int device) const { return num_sms_[device]; }

  // Enqueues `grid` blocks on the stream, whose device must be prepared; `args` points to one
  // pointer per kernel parameter. No allocation, no lock, no environment. Throws Error.
  void Launch(CUstream stream, int grid, void** args) const;

 private:
  const std::shared_ptr<const Cubin> cubin_;
  const int smem_bytes_;
  const int threads_;
  const int cluster_size_;

  std::mutex mutex_;  // Guards loading; never taken once a device is prepared.
  // Written once, before the first bit of prepared_ is set.
  const Driver* driver_ = nullptr;  // Kept, because GetDriver takes a lock.
  CUlibrary library_ = nullptr;
  CUkernel kernel_ = nullptr;
  std::array<int, kMaxDevices> num_sms_ =
      {};                                   // Of each device, before its bit of prepared_ is set.
  std::atomic<std::uint64_t> prepared_{0};  // Bit i: device i is prepared.
};

// The process' kernel of this source, compiled if need be; one for all who own it at the same time.
// The other arguments are Kernel's. Throws Error.
std::shared_ptr<Kernel> GetKernel(const KernelSource& source, int smem_bytes, int threads,
                                  int cluster_size);

// How many libraries of kernels this process has loaded and not unloaded.
int LoadedLibraries();

// How many launches this process has enqueued or recorded. A graph that is replayed adds none.
std::int64_t Launches();

}  // namespace dg::jit
