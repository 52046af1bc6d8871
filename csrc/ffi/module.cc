// The Python extension jax_deepgemm.ffi._native: handlers for XLA, and selection, compilation and
// device information for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "csrc/ffi/handlers.h"
#include "csrc/ffi/jit_bindings.h"
#include "csrc/ffi/plan.h"
#include "csrc/gemm/config.h"
#include "csrc/gemm/kernel_source.h"
#include "csrc/gemm/select.h"
#include "csrc/jit/error.h"
#include "csrc/jit/source.h"

namespace nb = nanobind;

namespace dg::ffi {
namespace {

// A GemmConfig on its way from or to Python, in the order of jax_deepgemm.GemmConfig's fields.
using ConfigFields = std::array<int, 8>;

GemmConfig FromFields(const ConfigFields& fields) {
  return {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5], fields[6], fields[7]};
}

ConfigFields ToFields(const GemmConfig& config) {
  return {config.block_m,   config.block_n,   config.num_stages, config.math_warpgroups,
          config.cluster_m, config.cluster_n, config.cluster_k,  config.raster_m};
}

// A config whose fields the geometry can be computed with.
GemmConfig WellFormed(const ConfigFields& fields) {
  const GemmConfig config = FromFields(fields);
  if (const std::string why = WhyMalformed(config); !why.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "config: " + why);
  }
  return config;
}

template <typename Pointer>
nb::capsule Capsule(Pointer* pointer) {
  return nb::capsule(reinterpret_cast<void*>(pointer));
}

void BindGemm(nb::module_& m) {
  m.def("gemm_handlers", [] {
    nb::dict bundle;
    bundle["instantiate"] = Capsule(GemmInstantiate());
    bundle["initialize"] = Capsule(GemmInitialize());
    bundle["execute"] = Capsule(GemmExecute());
    return bundle;
  });
  m.def("gemm_state_type", [] {
    nb::dict type;
    type["type_id"] = Capsule(GemmStateTypeId());
    type["type_info"] = Capsule(GemmStateTypeInfo());
    return type;
  });
  m.attr("GEMM_TARGET") = kGemmTarget;
  m.attr("GEMM_STATE_TYPE") = kGemmStateType;
  m.attr("FFI_API_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);

  m.def("why_unsupported", [](int64_t rows, int64_t n, int64_t k, int num_sms) {
    return WhyUnsupported({rows, n, k, num_sms});
  });
  m.def("why_illegal",
        [](int64_t rows, int64_t n, int64_t k, int num_sms, const ConfigFields& config) {
          return WhyIllegal({rows, n, k, num_sms}, FromFields(config));
        });
  m.def("select_config", [](int64_t rows, int64_t n, int64_t k, int num_sms) {
    return ToFields(PlanGemm({rows, n, k, num_sms}, std::nullopt));
  });
  m.def("candidates", [](int64_t rows, int64_t n, int64_t k, int num_sms) {
    std::vector<ConfigFields> fields;
    for (const GemmConfig& config : Candidates({rows, n, k, num_sms})) {
      fields.push_back(ToFields(config));
    }
    return fields;
  });
  m.def("estimate_us",
        [](int64_t rows, int64_t n, int64_t k, int num_sms, const ConfigFields& config) {
          return EstimateUs({rows, n, k, num_sms}, WellFormed(config));
        });
  m.def("smem_bytes",
        [](const ConfigFields& config) { return WellFormed(config).smem().total_bytes(); });
  m.def("kernel_name", [](int64_t n, int64_t k, const ConfigFields& config) {
    return KernelName({1, n, k, 1}, WellFormed(config));
  });
  m.def("kernel_source", [](int64_t n, int64_t k, int num_sms, const ConfigFields& fields) {
    const GemmProblem problem = {1, n, k, num_sms};
    const GemmConfig config = PlanGemm(problem, FromFields(fields));
    const jit::KernelSource source = GemmSource(problem, config);
    nb::dict headers;
    for (const jit::NamedText& file : source.headers) {
      headers[nb::str(file.name.data(), file.name.size())] =
          nb::str(file.text.data(), file.text.size());
    }
    return nb::make_tuple(source.text, headers);
  });
}

}  // namespace
}  // namespace dg::ffi

NB_MODULE(_native, m) {
  m.doc() = "Native part of jax_deepgemm: FFI handlers, kernel selection and compilation.";
  dg::ffi::BindJit(m);
  dg::ffi::BindGemm(m);
}
