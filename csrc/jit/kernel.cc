#include "csrc/jit/kernel.h"

#include <atomic>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "csrc/jit/cache.h"
#include "csrc/jit/error.h"

namespace dg::jit {
namespace {

// Makes a device's primary context, the one XLA's streams belong to, current while it lives.
class PrimaryContext {
 public:
  PrimaryContext(const Driver& driver, CUdevice device) : driver_(driver), device_(device) {
    CUcontext context = nullptr;
    Check(driver_.cuDevicePrimaryCtxRetain(&context, device_), "cuDevicePrimaryCtxRetain");
    const CUresult result = driver_.cuCtxPushCurrent(context);
    if (result != CUDA_SUCCESS) driver_.cuDevicePrimaryCtxRelease(device_);
    Check(result, "cuCtxPushCurrent");
  }

  ~PrimaryContext() {
    CUcontext context = nullptr;
    driver_.cuCtxPopCurrent(&context);
    driver_.cuDevicePrimaryCtxRelease(device_);
  }

  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

 private:
  const Driver& driver_;
  const CUdevice device_;
};

// The driver's attribute setter is not safe against other setters on the same device, and it may be
// another kernel's: one lock for the process.
void SetDynamicSmem(const Driver& driver, CUkernel kernel, int smem_bytes, CUdevice device) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  Check(driver.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes,
                                    kernel, device),
        "cuKernelSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES)");
}

std::atomic<int> loaded_libraries{0};
std::atomic<std::int64_t> launches{0};

}  // namespace

int LoadedLibraries() { return loaded_libraries.load(); }

std::int64_t Launches() { return launches.load(std::memory_order_relaxed); }

Kernel::Kernel(std::shared_ptr<const Cubin> cubin, int smem_bytes, int threads, int cluster_size)
    : cubin_(std::move(cubin)),
      smem_bytes_(smem_bytes),
      threads_(threads),
      cluster_size_(cluster_size) {}

Kernel::~Kernel() {
  if (library_ == nullptr) return;
  // While the process ends, the driver may be gone, and with it the library.
  const CUresult result = driver_->cuLibraryUnload(library_);
  if (result == CUDA_SUCCESS || result == CUDA_ERROR_DEINITIALIZED) --loaded_libraries;
}

void Kernel::CheckOrdinal(int device) {
  if (device >= 0 && device < kMaxDevices) return;
  throw Error(ErrorCode::kUnimplemented, "device ordinal " + std::to_string(device) +
                                             " is not below " + std::to_string(kMaxDevices));
}

void Kernel::Prepare(int device) {
  CheckOrdinal(device);
  const std::uint64_t bit = std::uint64_t{1} << device;
  if ((prepared_.load(std::memory_order_acquire) & bit) != 0) return;

  const std::lock_guard<std::mutex> lock(mutex_);
  if ((prepared_.load(std::memory_order_relaxed) & bit) != 0) return;
  if (driver_ == nullptr) driver_ = &GetDriver();
  const Driver& driver = *driver_;
  CUdevice handle = 0;
  Check(driver.cuDeviceGet(&handle, device), "cuDeviceGet");
  CheckHopper(driver, handle);
  const PrimaryContext context(driver, handle);
  if (library_ == nullptr) {
    Check(driver.cuLibraryLoadData(&library_, cubin_->image.data(), nullptr, nullptr, 0, nullptr,
                                   nullptr, 0),
          "cuLibraryLoadData");
    ++loaded_libraries;
  }
  if (kernel_ == nullptr) {
    Check(driver.cuLibraryGetKernel(&kernel_, library_, cubin_->entry.c_str()),
          "cuLibraryGetKernel");
  }
  SetDynamicSmem(driver, kernel_, smem_bytes_, handle);
  // Loading is lazy: asking for the context's function uploads the code now, not at first launch.
  CUfunction function = nullptr;
  Check(driver.cuKernelGetFunction(&function, kernel_), "cuKernelGetFunction");
  num_sms_[device] = DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, handle);
  prepared_.fetch_or(bit, std::memory_order_release);
}

void Kernel::Launch(CUstream stream, int grid, void** args) const {
  CUlaunchAttribute cluster = {};
  cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  cluster.value.clusterDim.x = static_cast<unsigned>(cluster_size_);
  cluster.value.clusterDim.y = 1;
  cluster.value.clusterDim.z = 1;

  CUlaunchConfig config = {};
  config.gridDimX = static_cast<unsigned>(grid);
  config.gridDimY = 1;
  config.gridDimZ = 1;
  config.blockDimX = static_cast<unsigned>(threads_);
  config.blockDimY = 1;
  config.blockDimZ = 1;
  config.sharedMemBytes = static_cast<unsigned>(smem_bytes_);
  config.hStream = stream;
  config.attrs = &cluster;
  config.numAttrs = cluster_size_ > 1 ? 1 : 0;
  // A CUkernel may stand for its function in the stream's context (CUDA driver API,
  // cuLaunchKernel).
  Check(driver_->cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel_), args, nullptr),
        "cuLaunchKernelEx");
  launches.fetch_add(1, std::memory_order_relaxed);
}

std::shared_ptr<Kernel> GetKernel(const KernelSource& source, int smem_bytes, int threads,
                                  int cluster_size) {
  // Never destroyed: owners that the process' end destroys may come later.
  static auto* const mutex = new std::mutex;
  static auto* const kernels = new std::map<std::string, std::weak_ptr<Kernel>>;
  {
    const std::lock_guard<std::mutex> lock(*mutex);
    const auto found = kernels->find(source.name);
    if (found != kernels->end()) {
      if (std::shared_ptr<Kernel> kernel = found->second.lock()) return kernel;
    }
  }
  // Compile outside the lock: other kernels need not wait.
  auto made = std::make_shared<Kernel>(GetOrCompile(source), smem_bytes, threads, cluster_size);
  const std::lock_guard<std::mutex> lock(*mutex);
  for (auto entry = kernels->begin(); entry != kernels->end();) {
    entry = entry->second.expired() ? kernels->erase(entry) : std::next(entry);
  }
  std::weak_ptr<Kernel>& slot = (*kernels)[source.name];
  if (std::shared_ptr<Kernel> kernel = slot.lock()) return kernel;  // another thread's
  slot = made;
  return made;
}

}  // namespace dg::jit
