// The Python extension jax_deepgemm.ffi._native: handlers for XLA, and selection, compilation and
// device information for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "csrc/ffi/bindings.h"
#include "csrc/ffi/handlers.h"
#include "csrc/ffi/jit_bindings.h"
#include "csrc/ffi/plan.h"
#include "csrc/ffi/quantize_bindings.h"
#include "csrc/gemm/config.h"
#include "csrc/gemm/cost_model.h"
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

// A GemmProblem on its way from Python: op, num_groups, m, expected_m, n, k, num_sms, a_type,
// b_type, batch_invariant, memory_gbs.
using ProblemFields = std::array<int64_t, 11>;

GemmProblem ToProblem(const ProblemFields& fields) {
  return {ToGrouping(fields[0]),
          fields[1],
          fields[2],
          fields[3],
          fields[4],
          fields[5],
          static_cast<int>(fields[6]),
          ToFp8(fields[7]),
          ToFp8(fields[8]),
          fields[9] != 0,
          static_cast<int>(fields[10])};
}

nb::dict ToDict(const CostModel& model) {
  nb::dict constants;
  for (const CostConstant& constant : kCostConstants) {
    constants[constant.name] = model.*constant.value;
  }
  return constants;
}

// The model with some constants replaced.
CostModel ToCostModel(const nb::dict& constants) {
  CostModel model;
  std::size_t known = 0;
  for (const CostConstant& constant : kCostConstants) {
    if (!constants.contains(constant.name)) continue;
    model.*constant.value = nb::cast<double>(constants[constant.name]);
    ++known;
  }
  if (known != constants.size()) {
    throw Error(ErrorCode::kInvalidArgument, "constants: one of them is none of cost_constants()");
  }
  return model;
}

void BindGemm(nb::module_& m) {
  m.def("gemm_handlers", [] {
    nb::dict bundle;
    bundle["instantiate"] = ToCapsule(GemmInstantiate());
    bundle["initialize"] = ToCapsule(GemmInitialize());
    bundle["execute"] = ToCapsule(GemmExecute());
    return bundle;
  });
  m.def("gemm_state_type", [] {
    nb::dict type;
    type["type_id"] = ToCapsule(GemmStateTypeId());
    type["type_info"] = ToCapsule(GemmStateTypeInfo());
    return type;
  });
  m.attr("GEMM_TARGET") = kGemmTarget;
  m.attr("GEMM_STATE_TYPE") = kGemmStateType;
  m.attr("FFI_API_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);

  m.def("why_unsupported",
        [](const ProblemFields& problem) { return WhyUnsupported(ToProblem(problem)); });
  m.def("why_illegal", [](const ProblemFields& problem, const ConfigFields& config) {
    return WhyIllegal(ToProblem(problem), FromFields(config));
  });
  m.def("select_config", [](const ProblemFields& problem) {
    return ToFields(PlanGemm(ToProblem(problem), std::nullopt));
  });
  m.def("candidates", [](const ProblemFields& problem) {
    std::vector<ConfigFields> fields;
    for (const GemmConfig& config : Candidates(ToProblem(problem))) {
      fields.push_back(ToFields(config));
    }
    return fields;
  });
  m.def("cost_constants", [] { return ToDict(CostModel()); });
  m.def(
      "estimates_us",
      [](const ProblemFields& problem, const std::vector<ConfigFields>& configs,
         const nb::dict& constants) {
        const CostModel model = ToCostModel(constants);
        std::vector<double> estimates;
        for (const ConfigFields& config : configs) {
          estimates.push_back(EstimateUs(ToProblem(problem), WellFormed(config), model));
        }
        return estimates;
      },
      nb::arg("problem"), nb::arg("configs"), nb::arg("constants") = nb::dict());
  m.def("smem_bytes",
        [](const ConfigFields& config) { return WellFormed(config).smem().total_bytes(); });
  m.def("grid_size", [](const ProblemFields& problem, const ConfigFields& config) {
    return GridSize(ToProblem(problem), WellFormed(config));
  });
  m.def("kernel_name", [](const ProblemFields& problem, const ConfigFields& config) {
    return KernelName(ToProblem(problem), WellFormed(config));
  });
  m.def("kernel_source", [](const ProblemFields& fields, const ConfigFields& config_fields) {
    const GemmProblem problem = ToProblem(fields);
    return ToTuple(GemmSource(problem, PlanGemm(problem, FromFields(config_fields))));
  });
}

}  // namespace
}  // namespace dg::ffi

NB_MODULE(_native, m) {
  m.doc() = "Native part of jax_deepgemm: FFI handlers, kernel selection and compilation.";
  dg::ffi::BindJit(m);
  dg::ffi::BindGemm(m);
  dg::ffi::BindQuantize(m);
}
