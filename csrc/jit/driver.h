// The CUDA driver, loaded at run time so that the extension imports where there is none.
//
// kernel.h launches through it, csrc/ffi encodes tensor maps and lists devices. Driver API
// 12.0 is the oldest that has every entry point.
#pragma once

#include <cuda.h>

#include <string>
#include <vector>

namespace dg::jit {

// Entry points of libcuda, each with the name and signature of the driver API.
struct Driver {
  decltype(&::cuInit) cuInit;
  decltype(&::cuGetErrorName) cuGetErrorName;
  decltype(&::cuGetErrorString) cuGetErrorString;
  decltype(&::cuDeviceGetCount) cuDeviceGetCount;
  decltype(&::cuDeviceGet) cuDeviceGet;
  decltype(&::cuDeviceGetName) cuDeviceGetName;
  decltype(&::cuDeviceGetAttribute) cuDeviceGetAttribute;
  decltype(&::cuDevicePrimaryCtxRetain) cuDevicePrimaryCtxRetain;
  decltype(&::cuDevicePrimaryCtxRelease) cuDevicePrimaryCtxRelease;
  decltype(&::cuCtxPushCurrent) cuCtxPushCurrent;
  decltype(&::cuCtxPopCurrent) cuCtxPopCurrent;
  decltype(&::cuCtxGetDevice) cuCtxGetDevice;
  decltype(&::cuLibraryLoadData) cuLibraryLoadData;
  decltype(&::cuLibraryGetKernel) cuLibraryGetKernel;
  decltype(&::cuLibraryUnload) cuLibraryUnload;
  decltype(&::cuKernelGetFunction) cuKernelGetFunction;
  decltype(&::cuKernelSetAttribute) cuKernelSetAttribute;
  decltype(&::cuLaunchKernelEx) cuLaunchKernelEx;
  decltype(&::cuTensorMapEncodeTiled) cuTensorMapEncodeTiled;
};

// The loaded and initialised driver; throws Error when it is missing, too old or has no device. A
// failure is tried again at the next call.
const Driver& GetDriver();

// Throws Error "<call>: <code's name> (<description>)" unless `result` is CUDA_SUCCESS.
void Check(CUresult result, const char* call);

// One attribute of a device; throws Error.
int DeviceAttribute(const Driver& driver, CUdevice_attribute attribute, CUdevice device);

// Peak rate of a device's memory, in GB/s, from its clock and width; 0 if the driver does not say.
int MemoryGbs(const Driver& driver, CUdevice device);

// Throws Error, with the device's name and compute capability, unless it runs sm_90a code.
void CheckHopper(const Driver& driver, CUdevice device);

// What the driver says about one GPU.
struct Device {
  std::string name;
  int ordinal;
  int major;  // Compute capability.
  int minor;
  int num_sms;
  int memory_gbs;  // See MemoryGbs.
};

// The GPUs of this process; empty when libcuda is absent or reports no device.
std::vector<Device> ListDevices();

}  // namespace dg::jit
