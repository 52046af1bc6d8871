#include "csrc/ffi/quantize_handlers.h"

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>

#include "csrc/ffi/buffers.h"
#include "csrc/ffi/guard.h"
#include "csrc/gemm/config.h"
#include "csrc/jit/error.h"
#include "csrc/jit/kernel.h"

namespace dg::ffi {
namespace {

namespace xffi = ::xla::ffi;

// Attributes of the custom call: QuantizeFields by name.
struct QuantizeAttributes {
  int64_t op, input, output, power_of_two, batch, rows, k, num_sizes;
};

}  // namespace
}  // namespace dg::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    dg::ffi::QuantizeAttributes, xla::ffi::StructMember<int64_t>("op"),
    xla::ffi::StructMember<int64_t>("input"), xla::ffi::StructMember<int64_t>("output"),
    xla::ffi::StructMember<int64_t>("power_of_two"), xla::ffi::StructMember<int64_t>("batch"),
    xla::ffi::StructMember<int64_t>("rows"), xla::ffi::StructMember<int64_t>("k"),
    xla::ffi::StructMember<int64_t>("num_sizes"));

namespace dg::ffi {

QuantizeProblem ToQuantizeProblem(const QuantizeFields& fields) {
  const auto within = [](int64_t value, int64_t count, const char* name) {
    if (value < 0 || value >= count) {
      throw Error(ErrorCode::kInvalidArgument,
                  "there is no " + std::string(name) + " " + std::to_string(value));
    }
    return static_cast<int>(value);
  };
  const QuantizeProblem problem = {static_cast<QuantizeOp>(within(fields[0], 5, "op")),
                                   static_cast<FloatType>(within(fields[1], 3, "input")),
                                   static_cast<Fp8Type>(within(fields[2], 2, "output")),
                                   fields[3] != 0,
                                   fields[4],
                                   fields[5],
                                   fields[6],
                                   fields[7]};
  if (const std::string why = WhyUnsupported(problem); !why.empty()) {
    throw Error(ErrorCode::kInvalidArgument, why);
  }
  return problem;
}

namespace {

// One call site, on all devices and for all executions: nothing in it changes. The kernel does not
// depend on the device, and keeps track of those it is loaded on.
struct QuantizeState {
  static xffi::TypeId id;

  QuantizeProblem problem;
  std::shared_ptr<jit::Kernel> kernel;
};
xffi::TypeId QuantizeState::id = {};

template <typename Body>
xffi::Error Guarded(const Body& body) {
  return ffi::Guarded([] { return std::string("quantize"); }, body);
}

xffi::ErrorOr<std::unique_ptr<QuantizeState>> Instantiate(QuantizeAttributes attributes) {
  std::unique_ptr<QuantizeState> state;
  const xffi::Error status = Guarded([&] {
    const QuantizeAttributes& a = attributes;
    const QuantizeProblem problem = ToQuantizeProblem(
        {a.op, a.input, a.output, a.power_of_two, a.batch, a.rows, a.k, a.num_sizes});
    // Compile now, where an error is the user's compile error.
    std::shared_ptr<jit::Kernel> kernel = jit::GetKernel(QuantizeSource(problem), /*smem_bytes=*/0,
                                                         kQuantizeThreads, /*cluster_size=*/1);
    state = std::make_unique<QuantizeState>(QuantizeState{problem, std::move(kernel)});
  });
  if (status.failure()) return xffi::Unexpected(status);
  return state;
}

xffi::Error Initialize(QuantizeState* state, int32_t device) {
  return Guarded([&] { state->kernel->Prepare(device); });
}

xffi::DataType ToDataType(FloatType type) {
  return type == FloatType::kBf16  ? xffi::DataType::BF16
         : type == FloatType::kF16 ? xffi::DataType::F16
                                   : xffi::DataType::F32;
}

// A buffer's memory; throws Error unless it has this type and these sizes.
void* Data(const xffi::AnyBuffer& buffer, const char* name, xffi::DataType type,
           std::initializer_list<int64_t> dimensions) {
  CheckBuffer(buffer, name, type, dimensions);
  void* const data = buffer.untyped_data();
  if (reinterpret_cast<std::uintptr_t>(data) % 16 != 0) {
    throw Error(ErrorCode::kInternal, std::string(name) + " is not aligned to 16 bytes");
  }
  return data;
}

xffi::AnyBuffer Result(const xffi::RemainingRets& results, size_t index) {
  const xffi::ErrorOr<xffi::Result<xffi::AnyBuffer>> buffer = results.get<xffi::AnyBuffer>(index);
  if (buffer.has_error()) throw Error(ErrorCode::kInvalidArgument, buffer.error().message());
  xffi::Result<xffi::AnyBuffer> result = *buffer;  // whose operator* is not const in every version
  return *result;
}

xffi::Error Execute(CUstream stream, int32_t device, QuantizeState* state, xffi::AnyBuffer x,
                    xffi::RemainingArgs sizes, xffi::RemainingRets results) {
  return Guarded([&] {
    const QuantizeProblem& p = state->problem;
    const xffi::DataType fp8 =
        p.output == Fp8Type::kE4m3 ? xffi::DataType::F8E4M3FN : xffi::DataType::F8E5M2;
    const int64_t k_blocks = CeilDiv(p.k, kQuantizeBlock);
    const int64_t row_blocks = CeilDiv(p.rows, kQuantizeBlock);
    const size_t num_results = p.op == QuantizeOp::kPerTokenBoth ? 4 : 2;
    if (sizes.size() != (p.num_sizes > 0 ? 1u : 0u) || results.size() != num_results) {
      throw Error(ErrorCode::kInvalidArgument, "there are too many or too few buffers");
    }

    QuantizeParams params = {};
    const int64_t columns = p.op == QuantizeOp::kSiluMul ? 2 * p.k : p.k;
    params.x = Data(x, "x", ToDataType(p.input), {p.batch * p.rows, columns});
    if (p.num_sizes > 0) {
      params.sizes = static_cast<const int*>(
          Data(RemainingArgument(sizes, 0), "sizes", xffi::DataType::S32, {p.batch * p.num_sizes}));
    }
    size_t index = 0;
    if (writes_rows(p.op)) {
      params.values = Data(Result(results, index++), "values", fp8, {p.batch * p.rows, p.k});
      const int64_t scale_rows =
          p.op == QuantizeOp::kPerBlock ? p.batch * row_blocks : p.batch * p.rows;
      params.scales = static_cast<float*>(
          Data(Result(results, index++), "scales", xffi::DataType::F32, {scale_rows, k_blocks}));
    }
    if (writes_transposed(p.op)) {
      params.values_t = Data(Result(results, index++), "values", fp8, {p.batch * p.k, p.rows});
      params.scales_t = static_cast<float*>(Data(Result(results, index++), "scales",
                                                 xffi::DataType::F32, {p.batch * p.k, row_blocks}));
    }
    // No launch would be an empty graph, if this were captured; but XLA folds operations without
    // elements (ZeroSizedHloElimination).
    const int64_t grid = GridSize(p, p.num_sizes > 0 ? state->kernel->NumSms(device) : 0);
    if (grid == 0) return;
    params.batch = static_cast<int>(p.batch);
    params.num_sizes = static_cast<int>(p.num_sizes);
    params.rows = static_cast<int>(p.rows);
    params.k = static_cast<int>(p.k);
    params.row_tiles = static_cast<int>(RowTiles(p));
    params.column_tiles = static_cast<int>(ColumnTiles(p));
    params.scales_pitch = static_cast<int>(p.batch * p.rows);
    params.scales_t_pitch = static_cast<int>(p.batch * p.k);
    void* arguments[] = {&params};
    state->kernel->Launch(stream, static_cast<int>(grid), arguments);
  });
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       xffi::Ffi::BindInstantiate().Attr<QuantizeAttributes>("problem"));

XLA_FFI_DEFINE_HANDLER(
    kInitialize, Initialize,
    xffi::Ffi::BindInitialize().Ctx<xffi::State<QuantizeState>>().Ctx<xffi::DeviceOrdinal>());

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       xffi::Ffi::BindExecute()
                           .Ctx<xffi::PlatformStream<CUstream>>()
                           .Ctx<xffi::DeviceOrdinal>()
                           .Ctx<xffi::State<QuantizeState>>()
                           .Arg<xffi::AnyBuffer>()
                           .RemainingArgs()
                           .RemainingRets(),
                       {xffi::Traits::kCmdBufferCompatible});

}  // namespace

XLA_FFI_Handler* QuantizeInstantiate() { return kInstantiate; }
XLA_FFI_Handler* QuantizeInitialize() { return kInitialize; }
XLA_FFI_Handler* QuantizeExecute() { return kExecute; }

XLA_FFI_TypeId* QuantizeStateTypeId() { return &QuantizeState::id; }

XLA_FFI_TypeInfo* QuantizeStateTypeInfo() {
  static xffi::TypeInfo info = xffi::MakeTypeInfo<QuantizeState>();
  return &info;
}

}  // namespace dg::ffi
