#include "csrc/ffi/handlers.h"

#include <cuda.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>

#include "csrc/ffi/plan.h"
#include "csrc/gemm/config.h"
#include "csrc/gemm/tensor_maps.h"
#include "csrc/jit/driver.h"
#include "csrc/jit/error.h"
#include "csrc/jit/kernel.h"

namespace dg::ffi {
namespace {

namespace xffi = ::xla::ffi;

constexpr char kOp[] = "gemm_fp8_fp8_bf16_nt";

// Attributes of the custom call, as the lowering rule (jax_deepgemm/gemm.py) writes them.
struct GemmAttributes {
  int64_t m, n, k;
  int64_t num_sms;  // 0: all of the device's
  // An explicit configuration; block_m = 0: select one.
  int64_t block_m, block_n, num_stages, math_warpgroups, cluster_m, cluster_n, cluster_k, raster_m;
};

}  // namespace
}  // namespace dg::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    dg::ffi::GemmAttributes, xla::ffi::StructMember<int64_t>("m"),
    xla::ffi::StructMember<int64_t>("n"), xla::ffi::StructMember<int64_t>("k"),
    xla::ffi::StructMember<int64_t>("num_sms"), xla::ffi::StructMember<int64_t>("block_m"),
    xla::ffi::StructMember<int64_t>("block_n"), xla::ffi::StructMember<int64_t>("num_stages"),
    xla::ffi::StructMember<int64_t>("math_warpgroups"),
    xla::ffi::StructMember<int64_t>("cluster_m"), xla::ffi::StructMember<int64_t>("cluster_n"),
    xla::ffi::StructMember<int64_t>("cluster_k"), xla::ffi::StructMember<int64_t>("raster_m"));

namespace dg::ffi {
namespace {

// What instantiate decides once for all devices and executions of one call site.
struct GemmState {
  static xffi::TypeId id;

  GemmProblem problem;
  GemmConfig config;
  jit::Kernel* kernel;        // lives as long as the process
  const jit::Driver* driver;  // kept, so that execute takes no lock
};
xffi::TypeId GemmState::id = {};

xffi::Error ToStatus(const std::exception& exception) {
  xffi::ErrorCode code = xffi::ErrorCode::kInternal;
  if (const auto* error = dynamic_cast<const Error*>(&exception)) {
    switch (error->code()) {
      case ErrorCode::kInvalidArgument:
        code = xffi::ErrorCode::kInvalidArgument;
        break;
      case ErrorCode::kUnimplemented:
        code = xffi::ErrorCode::kUnimplemented;
        break;
      case ErrorCode::kUnavailable:
        code = xffi::ErrorCode::kUnavailable;
        break;
      case ErrorCode::kInternal:
        break;
    }
  }
  return xffi::Error(code, std::string(kOp) + ": " + exception.what());
}

// No exception leaves a handler.
template <typename Body>
xffi::Error Guarded(const Body& body) {
  try {
    body();
    return xffi::Error::Success();
  } catch (const std::exception& exception) {
    return ToStatus(exception);
  }
}

int DeviceAttribute(const jit::Driver& driver, CUdevice_attribute attribute, CUdevice device) {
  int value = 0;
  jit::Check(driver.cuDeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
  return value;
}

// Throws unless the device runs sm_90a code.
void CheckDevice(const jit::Driver& driver, CUdevice device) {
  const int major =
      DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
  const int minor =
      DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
  if (major == 9 && minor == 0) return;
  char name[256] = "";
  jit::Check(driver.cuDeviceGetName(name, sizeof(name), device), "cuDeviceGetName");
  throw Error(ErrorCode::kUnimplemented,
              std::string("this kernel needs a Hopper GPU (sm_90: H100, H200, GH200), but device ") +
                  std::to_string(device) + " is " + name + " (sm_" + std::to_string(major) +
                  std::to_string(minor) + ")");
}

xffi::ErrorOr<std::unique_ptr<GemmState>> Instantiate(GemmAttributes attributes) {
  std::unique_ptr<GemmState> state;
  const xffi::Error status = Guarded([&] {
    const jit::Driver& driver = jit::GetDriver();
    // XLA compiles for the device whose context is current.
    CUdevice device = 0;
    jit::Check(driver.cuCtxGetDevice(&device), "cuCtxGetDevice");
    CheckDevice(driver, device);
    int num_sms = DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
    if (attributes.num_sms > 0 && attributes.num_sms < num_sms) {
      num_sms = static_cast<int>(attributes.num_sms);
    }
    const GemmProblem problem = {attributes.m, attributes.n, attributes.k, num_sms};
    std::optional<GemmConfig> config;
    if (attributes.block_m != 0) {
      const auto narrow = [](int64_t value) { return static_cast<int>(value); };
      config = GemmConfig{narrow(attributes.block_m),    narrow(attributes.block_n),
                          narrow(attributes.num_stages), narrow(attributes.math_warpgroups),
                          narrow(attributes.cluster_m),  narrow(attributes.cluster_n),
                          narrow(attributes.cluster_k),  narrow(attributes.raster_m)};
    }
    const GemmConfig planned = PlanGemm(problem, config);
    state = std::make_unique<GemmState>(
        GemmState{problem, planned, &GetGemmKernel(problem, planned), &driver});
  });
  if (status.failure()) return xffi::Unexpected(status);
  return state;
}

xffi::Error Initialize(GemmState* state, int32_t device) {
  return Guarded([&] { state->kernel->Prepare(device); });
}

CUtensorMap Encode(const jit::Driver& driver, const TensorMapSpec& spec, const void* data) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(spec.columns),
                              static_cast<cuuint64_t>(spec.rows)};
  const cuuint64_t pitches[] = {static_cast<cuuint64_t>(spec.pitch_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(spec.box_columns),
                            static_cast<cuuint32_t>(spec.box_rows)};
  const cuuint32_t strides[] = {1, 1};
  const CUtensorMapDataType type = spec.element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : spec.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const CUtensorMapSwizzle swizzle = spec.swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : spec.swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : spec.swizzle_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                : CU_TENSOR_MAP_SWIZZLE_NONE;
  // Fetching one 128-byte row of a box per miss is 2 to 5 % faster at decode than 256 bytes, whose
  // second half belongs to a later k-block; prefill does not mind.
  CUtensorMap map;
  jit::Check(driver.cuTensorMapEncodeTiled(
                 &map, type, /*tensorRank=*/2, const_cast<void*>(data), sizes, pitches, box,
                 strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
             "cuTensorMapEncodeTiled");
  return map;
}

xffi::Error Execute(CUstream stream, GemmState* state, xffi::AnyBuffer a, xffi::AnyBuffer sfa,
                    xffi::AnyBuffer b, xffi::AnyBuffer sfb, xffi::Result<xffi::AnyBuffer> d) {
  return Guarded([&] {
    GemmProblem problem = state->problem;
    problem.m = a.dimensions()[0];
    if (problem.m == 0) return;
    if (a.dimensions()[1] != problem.k || b.dimensions()[0] != problem.n) {
      throw Error(ErrorCode::kInternal, "operands do not have the shapes of the plan");
    }
    const TensorMapSpecs specs = MakeTensorMapSpecs(problem, state->config, sfa.dimensions()[0]);
    const jit::Driver& driver = *state->driver;
    CUtensorMap map_a = Encode(driver, specs.a, a.untyped_data());
    CUtensorMap map_b = Encode(driver, specs.b, b.untyped_data());
    CUtensorMap map_sfa = Encode(driver, specs.sfa, sfa.untyped_data());
    CUtensorMap map_d = Encode(driver, specs.d, d->untyped_data());
    const void* scales_b = sfb.untyped_data();
    int m = static_cast<int>(problem.m);
    void* arguments[] = {&map_a, &map_b, &map_sfa, &map_d, &scales_b, &m};
    state->kernel->Launch(stream, GridSize(problem, state->config), arguments);
  });
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       xffi::Ffi::BindInstantiate().Attr<GemmAttributes>("problem"));

XLA_FFI_DEFINE_HANDLER(kInitialize, Initialize,
                       xffi::Ffi::BindInitialize()
                           .Ctx<xffi::State<GemmState>>()
                           .Ctx<xffi::DeviceOrdinal>());

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       xffi::Ffi::BindExecute()
                           .Ctx<xffi::PlatformStream<CUstream>>()
                           .Ctx<xffi::State<GemmState>>()
                           .Arg<xffi::AnyBuffer>()
                           .Arg<xffi::AnyBuffer>()
                           .Arg<xffi::AnyBuffer>()
                           .Arg<xffi::AnyBuffer>()
                           .Ret<xffi::AnyBuffer>(),
                       {xffi::Traits::kCmdBufferCompatible});

}  // namespace

XLA_FFI_Handler* GemmInstantiate() { return kInstantiate; }
XLA_FFI_Handler* GemmInitialize() { return kInitialize; }
XLA_FFI_Handler* GemmExecute() { return kExecute; }

XLA_FFI_TypeId* GemmStateTypeId() { return &GemmState::id; }

XLA_FFI_TypeInfo* GemmStateTypeInfo() {
  static xffi::TypeInfo info = xffi::MakeTypeInfo<GemmState>();
  return &info;
}

}  // namespace dg::ffi
