#include "csrc/jit/driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <string>
#include <vector>

#include "csrc/jit/error.h"

namespace dg::jit {
namespace {

using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t,
                                    CUdriverProcAddressQueryResult*);

// The entry points of an opened libcuda, or an Error that says which version is missing.
class EntryPoints {
 public:
  explicit EntryPoints(void* library)
      : get_proc_address_(reinterpret_cast<GetProcAddress>(dlsym(library, "cuGetProcAddress_v2"))) {
    if (get_proc_address_ == nullptr) ThrowTooOld("cuGetProcAddress_v2");
  }

  // `version` is the first CUDA version with the wanted signature (1000 * major + 10 * minor).
  template <typename Function>
  void Load(Function*& function, const char* name, int version) const {
    void* address = nullptr;
    const CUresult result =
        get_proc_address_(name, &address, version, CU_GET_PROC_ADDRESS_DEFAULT, nullptr);
    // A symbol the driver does not know is a success with a null pointer.
    if (result != CUDA_SUCCESS || address == nullptr) ThrowTooOld(name);
    function = reinterpret_cast<Function*>(address);
  }

 private:
  [[noreturn]] static void ThrowTooOld(const std::string& name) {
    throw Error(ErrorCode::kUnavailable,
                "the CUDA driver (libcuda.so.1) is too old: it has no " + name +
                    "; jax_deepgemm needs a driver for CUDA 12.0 or newer");
  }

  GetProcAddress get_proc_address_;
};

Driver LoadEntryPoints(void* library) {
  const EntryPoints entry_points(library);
  Driver driver = {};
  entry_points.Load(driver.cuInit, "cuInit", 2000);
  entry_points.Load(driver.cuGetErrorName, "cuGetErrorName", 6000);
  entry_points.Load(driver.cuGetErrorString, "cuGetErrorString", 6000);
  entry_points.Load(driver.cuDeviceGetCount, "cuDeviceGetCount", 2000);
  entry_points.Load(driver.cuDeviceGet, "cuDeviceGet", 2000);
  entry_points.Load(driver.cuDeviceGetName, "cuDeviceGetName", 2000);
  entry_points.Load(driver.cuDeviceGetAttribute, "cuDeviceGetAttribute", 2000);
  entry_points.Load(driver.cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", 7000);
  entry_points.Load(driver.cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease", 11000);
  entry_points.Load(driver.cuCtxPushCurrent, "cuCtxPushCurrent", 4000);
  entry_points.Load(driver.cuCtxPopCurrent, "cuCtxPopCurrent", 4000);
  entry_points.Load(driver.cuCtxGetDevice, "cuCtxGetDevice", 2000);
  entry_points.Load(driver.cuLibraryLoadData, "cuLibraryLoadData", 12000);
  entry_points.Load(driver.cuLibraryGetKernel, "cuLibraryGetKernel", 12000);
  entry_points.Load(driver.cuLibraryUnload, "cuLibraryUnload", 12000);
  entry_points.Load(driver.cuKernelGetFunction, "cuKernelGetFunction", 12000);
  entry_points.Load(driver.cuKernelSetAttribute, "cuKernelSetAttribute", 12000);
  entry_points.Load(driver.cuLaunchKernelEx, "cuLaunchKernelEx", 11060);
  entry_points.Load(driver.cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled", 12000);
  return driver;
}

// "cuInit: CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)"; takes the table because
// cuInit fails before there is a process-wide one.
void CheckWith(const Driver& driver, CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return;
  const char* name = nullptr;
  const char* description = nullptr;
  driver.cuGetErrorName(result, &name);
  driver.cuGetErrorString(result, &description);
  const std::string code = name == nullptr ? "CUresult " + std::to_string(result) : name;
  const std::string reason = description == nullptr ? "" : " (" + std::string(description) + ")";
  throw Error(ErrorCode::kInternal, std::string(call) + ": " + code + reason);
}

// The process-wide driver, or null when libcuda is absent or there is no device. A success lasts
// until the process ends; an absence is looked for again.
const Driver* FindDriver(std::string* absence) {
  static std::mutex mutex;
  static const Driver* found = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (found != nullptr) return found;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    *absence = std::string("cannot be loaded: ") + dlerror();
    return nullptr;
  }
  const Driver driver = LoadEntryPoints(library);
  const CUresult result = driver.cuInit(0);
  if (result == CUDA_ERROR_NO_DEVICE) {
    *absence = "reports no device";
    return nullptr;
  }
  CheckWith(driver, result, "cuInit");
  found = new Driver(driver);  // Never freed: kernels keep a pointer to it.
  return found;
}

std::string DeviceName(const Driver& driver, CUdevice device) {
  std::array<char, 256> name = {};
  Check(driver.cuDeviceGetName(name.data(), static_cast<int>(name.size()), device),
        "cuDeviceGetName");
  return name.data();
}

}  // namespace

const Driver& GetDriver() {
  std::string absence;
  const Driver* driver = FindDriver(&absence);
  if (driver == nullptr) {
    throw Error(ErrorCode::kUnavailable, "the CUDA driver (libcuda.so.1) " + absence);
  }
  return *driver;
}

void Check(CUresult result, const char* call) {
  if (result != CUDA_SUCCESS) CheckWith(GetDriver(), result, call);
}

int DeviceAttribute(const Driver& driver, CUdevice_attribute attribute, CUdevice device) {
  int value = 0;
  Check(driver.cuDeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
  return value;
}

void CheckHopper(const Driver& driver, CUdevice device) {
  const int major = DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
  const int minor = DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
  if (major == 9 && minor == 0) return;
  throw Error(ErrorCode::kUnimplemented,
              "this kernel needs a Hopper GPU (sm_90: H100, H200, GH200), but device " +
                  std::to_string(device) + " is " + DeviceName(driver, device) + " (sm_" +
                  std::to_string(major) + std::to_string(minor) + ")");
}

int MemoryGbs(const Driver& driver, CUdevice device) {
  const int64_t khz = DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, device);
  const int64_t bits = DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, device);
  return static_cast<int>(std::max<int64_t>(0, 2 * khz * (bits / 8) / 1'000'000));
}

std::vector<Device> ListDevices() {
  std::string absence;
  const Driver* driver = FindDriver(&absence);
  if (driver == nullptr) return {};
  int count = 0;
  Check(driver->cuDeviceGetCount(&count), "cuDeviceGetCount");
  std::vector<Device> devices;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    CUdevice handle = 0;
    Check(driver->cuDeviceGet(&handle, ordinal), "cuDeviceGet");
    const auto attribute = [&](CUdevice_attribute which) {
      return DeviceAttribute(*driver, which, handle);
    };
    devices.push_back({DeviceName(*driver, handle), ordinal,
                       attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
                       attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
                       attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
                       MemoryGbs(*driver, handle)});
  }
  return devices;
}

}  // namespace dg::jit
