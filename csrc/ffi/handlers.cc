#include "csrc/ffi/handlers.h"

#include <cuda.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "csrc/ffi/buffers.h"
#include "csrc/ffi/guard.h"
#include "csrc/ffi/plan.h"
#include "csrc/gemm/config.h"
#include "csrc/gemm/tensor_maps.h"
#include "csrc/jit/driver.h"
#include "csrc/jit/error.h"
#include "csrc/jit/kernel.h"

namespace dg::ffi {
namespace {

namespace xffi = ::xla::ffi;

// Attributes of the custom call, as jax_deepgemm/custom_call.py writes them.
struct GemmAttributes {
  int64_t op;                               // a Grouping
  int64_t num_groups, m, expected_m, n, k;  // see GemmProblem
  int64_t num_sms;                          // 0: all of the device's
  int64_t fill_zero;                        // masked: rows beyond masked_m become zero
  // An explicit configuration; block_m = 0: select one.
  int64_t block_m, block_n, num_stages, math_warpgroups, cluster_m, cluster_n, cluster_k, raster_m;
  int64_t a_type, b_type;  // an Fp8
  int64_t batch_invariant;
};

struct Member {
  const char* name;
  int64_t GemmAttributes::* value;
  bool required;  // no: programs that were exported before it existed lack it, and mean 0
};

constexpr Member kMembers[] = {
    {"op", &GemmAttributes::op, true},
    {"num_groups", &GemmAttributes::num_groups, true},
    {"m", &GemmAttributes::m, true},
    {"expected_m", &GemmAttributes::expected_m, true},
    {"n", &GemmAttributes::n, true},
    {"k", &GemmAttributes::k, true},
    {"num_sms", &GemmAttributes::num_sms, true},
    {"fill_zero", &GemmAttributes::fill_zero, true},
    {"block_m", &GemmAttributes::block_m, true},
    {"block_n", &GemmAttributes::block_n, true},
    {"num_stages", &GemmAttributes::num_stages, true},
    {"math_warpgroups", &GemmAttributes::math_warpgroups, true},
    {"cluster_m", &GemmAttributes::cluster_m, true},
    {"cluster_n", &GemmAttributes::cluster_n, true},
    {"cluster_k", &GemmAttributes::cluster_k, true},
    {"raster_m", &GemmAttributes::raster_m, true},
    {"a_type", &GemmAttributes::a_type, false},
    {"b_type", &GemmAttributes::b_type, false},
    {"batch_invariant", &GemmAttributes::batch_invariant, false},
};

// The struct "problem". A member that is not known came from a newer release, and may change what
// is computed: it is refused. Fills `attributes` in order, so that an error can name the operation.
void ReadAttributes(const xffi::Dictionary& problem, GemmAttributes& attributes) {
  for (const Member& member : kMembers) {
    if (!problem.contains(member.name)) {
      if (!member.required) continue;
      throw Error(ErrorCode::kInvalidArgument, std::string("no attribute ") + member.name);
    }
    const xffi::ErrorOr<int64_t> value = problem.get<int64_t>(member.name);
    if (value.has_error()) {
      throw Error(ErrorCode::kInvalidArgument,
                  std::string("attribute ") + member.name + ": " + value.error().message());
    }
    attributes.*member.value = *value;
  }
  for (const std::string_view name : problem) {
    const auto has_name = [name](const Member& member) { return name == member.name; };
    if (std::none_of(std::begin(kMembers), std::end(kMembers), has_name)) {
      throw Error(ErrorCode::kInvalidArgument,
                  "unknown attribute " + std::string(name) +
                      ": the program was exported by a newer jax_deepgemm than this one");
    }
  }
}

// What one kind of device runs: its SM count decides.
struct DevicePlan {
  GemmProblem problem;
  GemmConfig config;
  std::shared_ptr<jit::Kernel> kernel;
};

// One call site, on all devices and for all executions. XLA drives devices from threads of their
// own, so each has a slot; execute reads its slot and takes no lock.
class GemmState {
 public:
  static xffi::TypeId id;

  GemmState(const GemmAttributes& attributes, const jit::Driver& driver)
      : driver(driver), attributes_(attributes) {}

  // The kernel for `device`, planned and compiled, but not yet loaded.
  DevicePlan Plan(CUdevice device) const {
    jit::CheckHopper(driver, device);
    int num_sms = jit::DeviceAttribute(driver, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
    if (attributes_.num_sms > 0 && attributes_.num_sms < num_sms) {
      num_sms = static_cast<int>(attributes_.num_sms);
    }
    const int memory_gbs = jit::MemoryGbs(driver, device);
    const GemmProblem problem = {ToGrouping(attributes_.op),
                                 attributes_.num_groups,
                                 attributes_.m,
                                 attributes_.expected_m,
                                 attributes_.n,
                                 attributes_.k,
                                 num_sms,
                                 ToFp8(attributes_.a_type),
                                 ToFp8(attributes_.b_type),
                                 attributes_.batch_invariant != 0,
                                 memory_gbs > 0 ? memory_gbs : kH100MemoryGbs};
    std::optional<GemmConfig> config;
    if (attributes_.block_m != 0) {
      const auto narrow = [](int64_t value) {
        if (value != static_cast<int>(value)) {
          throw Error(ErrorCode::kInvalidArgument,
                      "config: " + std::to_string(value) + " does not fit into 32 bits");
        }
        return static_cast<int>(value);
      };
      config = GemmConfig{narrow(attributes_.block_m),    narrow(attributes_.block_n),
                          narrow(attributes_.num_stages), narrow(attributes_.math_warpgroups),
                          narrow(attributes_.cluster_m),  narrow(attributes_.cluster_n),
                          narrow(attributes_.cluster_k),  narrow(attributes_.raster_m)};
    }
    const GemmConfig planned = PlanGemm(problem, config);
    return {problem, planned, GetGemmKernel(problem, planned)};
  }

  // Compiles the kernel for `device`, and keeps it for when that, or one like it, is prepared.
  void Compile(CUdevice device) { owned_.push_back(std::make_unique<DevicePlan>(Plan(device))); }

  // Makes `device` ready to execute; cheap once it is.
  void Prepare(int32_t device) {
    jit::Kernel::CheckOrdinal(device);
    if (plans_[device].load(std::memory_order_acquire) != nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_[device].load(std::memory_order_relaxed) != nullptr) return;
    CUdevice handle = 0;
    jit::Check(driver.cuDeviceGet(&handle, device), "cuDeviceGet");
    auto plan = std::make_unique<DevicePlan>(Plan(handle));
    plan->kernel->Prepare(device);
    plans_[device].store(plan.get(), std::memory_order_release);
    owned_.push_back(std::move(plan));
  }

  // The plan of a prepared device.
  const DevicePlan& plan(int32_t device) const {
    const DevicePlan* plan = plans_.at(device).load(std::memory_order_acquire);
    if (plan == nullptr) throw Error(ErrorCode::kInternal, "executed before it was initialized");
    return *plan;
  }

  const GemmAttributes& attributes() const { return attributes_; }
  const jit::Driver& driver;  // kept, because GetDriver takes a lock

 private:
  const GemmAttributes attributes_;
  std::mutex mutex_;  // guards owned_
  std::vector<std::unique_ptr<DevicePlan>> owned_;
  std::array<std::atomic<const DevicePlan*>, jit::Kernel::kMaxDevices> plans_ = {};
};
xffi::TypeId GemmState::id = {};

// The device XLA compiles for: the one whose context is current. Compiles on threads of the user's
// may have none; then the first Hopper GPU stands for it. Either way Prepare plans again for the
// device that executes, and only a GPU with another number of SMs gets another kernel.
CUdevice CompileDevice(const jit::Driver& driver) {
  CUdevice device = 0;
  const CUresult result = driver.cuCtxGetDevice(&device);
  if (result != CUDA_ERROR_INVALID_CONTEXT) {
    jit::Check(result, "cuCtxGetDevice");
    return device;
  }
  for (const jit::Device& candidate : jit::ListDevices()) {
    if (candidate.major == 9 && candidate.minor == 0) {
      jit::Check(driver.cuDeviceGet(&device, candidate.ordinal), "cuDeviceGet");
      return device;
    }
  }
  jit::Check(driver.cuDeviceGet(&device, 0), "cuDeviceGet");
  return device;
}

// The function that the user called.
std::string FunctionName(const GemmAttributes& attributes) {
  const auto grouping = static_cast<Grouping>(attributes.op);
  const std::string dense = "gemm_fp8_fp8_bf16_nt";
  return grouping == Grouping::kDense ? dense : "m_grouped_" + dense + "_" + GroupingName(grouping);
}

template <typename Body>
xffi::Error Guarded(const GemmAttributes& attributes, const Body& body) {
  return ffi::Guarded([&] { return FunctionName(attributes); }, body);
}

xffi::ErrorOr<std::unique_ptr<GemmState>> Instantiate(xffi::Dictionary problem) {
  std::unique_ptr<GemmState> state;
  GemmAttributes attributes = {};
  const xffi::Error status = Guarded(attributes, [&] {
    ReadAttributes(problem, attributes);
    ToGrouping(attributes.op);
    const jit::Driver& driver = jit::GetDriver();
    state = std::make_unique<GemmState>(attributes, driver);
    // Compile now, where an error is the user's compile error.
    state->Compile(CompileDevice(driver));
  });
  if (status.failure()) return xffi::Unexpected(status);
  return state;
}

xffi::Error Initialize(GemmState* state, int32_t device) {
  return Guarded(state->attributes(), [&] { state->Prepare(device); });
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
  // 256 bytes per miss: the second half belongs to the next k-block. With rings no deeper than
  // memory needs, that is up to 3 % faster where weights stream and no slower elsewhere.
  CUtensorMap map;
  jit::Check(driver.cuTensorMapEncodeTiled(
                 &map, type, /*tensorRank=*/2, const_cast<void*>(data), sizes, pitches, box,
                 strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
             "cuTensorMapEncodeTiled");
  return map;
}

// The arrays that say which row goes with which group, behind the four that every op has.
class GroupArrays {
 public:
  GroupArrays(const xffi::RemainingArgs& arrays, size_t expected) : arrays_(arrays) {
    if (arrays.size() != expected) {
      throw Error(ErrorCode::kInvalidArgument, "there must be " + std::to_string(expected) +
                                                   " arrays of groups, got " +
                                                   std::to_string(arrays.size()));
    }
  }

  // The int32 array at `index`; `size` -1 takes any.
  const int* get(size_t index, const char* name, int64_t size) const {
    const xffi::AnyBuffer array = RemainingArgument(arrays_, index);
    if (size < 0 && array.dimensions().size() == 1) size = array.dimensions()[0];
    CheckBuffer(array, name, xffi::DataType::S32, {size});
    return static_cast<const int*>(array.untyped_data());
  }

  int64_t size(size_t index) const {
    const xffi::AnyBuffer array = RemainingArgument(arrays_, index);
    return array.dimensions().size() == 1 ? array.dimensions()[0] : 0;
  }

 private:
  const xffi::RemainingArgs& arrays_;
};

// Fills in how this launch's rows are grouped.
void SetGroups(const GemmProblem& problem, const xffi::RemainingArgs& arrays, bool fill_zero,
               KernelParams& params) {
  switch (problem.grouping) {
    case Grouping::kDense:
      GroupArrays(arrays, 0);
      break;
    case Grouping::kContiguous: {
      const GroupArrays groups(arrays, 2);
      params.detail = groups.get(0, "m_indices", problem.m);
      params.groups = groups.get(1, "block_groups", CeilDiv(problem.m, kContiguousAlignment));
      break;
    }
    case Grouping::kMasked:
      params.groups = GroupArrays(arrays, 1).get(0, "masked_m", problem.num_groups);
      params.max_m = static_cast<int>(problem.m / problem.num_groups);
      params.fill_zero = fill_zero;
      break;
    case Grouping::kRagged: {
      const GroupArrays groups(arrays, 2);
      params.groups = groups.get(0, "group_sizes", -1);
      params.num_sizes = static_cast<int>(groups.size(0));
      params.detail = groups.get(1, "group_offset", 1);
      break;
    }
  }
}

xffi::Error Execute(CUstream stream, int32_t device, GemmState* state, xffi::AnyBuffer a,
                    xffi::AnyBuffer sfa, xffi::AnyBuffer b, xffi::AnyBuffer sfb,
                    xffi::RemainingArgs group_arrays, xffi::Result<xffi::AnyBuffer> d) {
  return Guarded(state->attributes(), [&] {
    const DevicePlan& plan = state->plan(device);
    const GemmProblem& problem = plan.problem;
    const int64_t k_blocks = KBlocks(problem);
    // Older exported programs (tests/data) pad SFA to a multiple of 4 rows.
    const int64_t padded_m = CeilDiv(problem.m, 4) * 4;
    const int64_t sfa_pitch =
        sfa.dimensions().size() == 2 && sfa.dimensions()[0] == padded_m ? padded_m : problem.m;
    const auto type = [](Fp8 fp8) {
      return fp8 == Fp8::kE4M3 ? xffi::DataType::F8E4M3FN : xffi::DataType::F8E5M2;
    };
    CheckBuffer(a, "a", type(problem.a_type), {problem.m, problem.k});
    CheckBuffer(b, "b", type(problem.b_type), {problem.num_groups * problem.n, problem.k});
    CheckBuffer(sfa, "sfa", xffi::DataType::F32, {sfa_pitch, k_blocks});
    CheckBuffer(sfb, "sfb", xffi::DataType::F32,
                {problem.num_groups * CeilDiv(problem.n, 128), k_blocks});
    CheckBuffer(*d, "d", xffi::DataType::BF16, {problem.m, problem.n});
    KernelParams params = {};
    SetGroups(problem, group_arrays, state->attributes().fill_zero != 0, params);
    // No launch would be an empty graph, if this were captured; but XLA folds operations without
    // elements (ZeroSizedHloElimination).
    if (problem.m == 0) return;
    params.sfa = static_cast<const float*>(sfa.untyped_data());
    params.sfb = static_cast<const float*>(sfb.untyped_data());
    params.d = d->untyped_data();
    params.m = static_cast<int>(problem.m);
    params.sfa_pitch = static_cast<int>(sfa_pitch);
    params.num_groups = static_cast<int>(problem.num_groups);
    const TensorMapSpecs specs =
        MakeTensorMapSpecs(problem, plan.config, HasParts(problem, plan.config), sfa_pitch);
    params.part_rows = specs.part_rows;
    const jit::Driver& driver = state->driver;
    CUtensorMap maps_a[2];  // the kernel takes one or both
    for (int i = 0; i < specs.num_a; ++i) {
      maps_a[i] = Encode(driver, specs.a[i], a.untyped_data());
    }
    CUtensorMap map_b = Encode(driver, specs.b, b.untyped_data());
    CUtensorMap map_sfa = Encode(driver, specs.sfa, sfa.untyped_data());
    CUtensorMap map_d = Encode(driver, specs.d, d->untyped_data());
    void* arguments[] = {maps_a, &map_b, &map_sfa, &map_d, &params};
    plan.kernel->Launch(stream, GridSize(problem, plan.config), arguments);
  });
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       xffi::Ffi::BindInstantiate().Attr<xffi::Dictionary>("problem"));

XLA_FFI_DEFINE_HANDLER(
    kInitialize, Initialize,
    xffi::Ffi::BindInitialize().Ctx<xffi::State<GemmState>>().Ctx<xffi::DeviceOrdinal>());

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       xffi::Ffi::BindExecute()
                           .Ctx<xffi::PlatformStream<CUstream>>()
                           .Ctx<xffi::DeviceOrdinal>()
                           .Ctx<xffi::State<GemmState>>()
                           .Arg<xffi::AnyBuffer>()
                           .Arg<xffi::AnyBuffer>()
                           .Arg<xffi::AnyBuffer>()
                           .Arg<xffi::AnyBuffer>()
                           .RemainingArgs()
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
