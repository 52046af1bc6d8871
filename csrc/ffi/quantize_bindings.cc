#include "csrc/ffi/quantize_bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include "csrc/ffi/bindings.h"
#include "csrc/ffi/quantize_handlers.h"
#include "csrc/quantize/quantize.h"

namespace nb = nanobind;

namespace dg::ffi {
void BindQuantize(nb::module_& m) {
  m.def("quantize_handlers", [] {
    nb::dict bundle;
    bundle["instantiate"] = ToCapsule(QuantizeInstantiate());
    bundle["initialize"] = ToCapsule(QuantizeInitialize());
    bundle["execute"] = ToCapsule(QuantizeExecute());
    return bundle;
  });
  m.def("quantize_state_type", [] {
    nb::dict type;
    type["type_id"] = ToCapsule(QuantizeStateTypeId());
    type["type_info"] = ToCapsule(QuantizeStateTypeInfo());
    return type;
  });
  m.attr("QUANTIZE_TARGET") = kQuantizeTarget;
  m.attr("QUANTIZE_STATE_TYPE") = kQuantizeStateType;

  m.def("quantize_kernel_name",
        [](const QuantizeFields& problem) { return KernelName(ToQuantizeProblem(problem)); });
  m.def("quantize_grid_size", [](const QuantizeFields& problem, int num_sms) {
    return GridSize(ToQuantizeProblem(problem), num_sms);
  });
  m.def("quantize_kernel_source", [](const QuantizeFields& problem) {
    return ToTuple(QuantizeSource(ToQuantizeProblem(problem)));
  });
}

}  // namespace dg::ffi
