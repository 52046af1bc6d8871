#include "csrc/ffi/quantize_bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include "csrc/ffi/quantize_handlers.h"
#include "csrc/jit/source.h"
#include "csrc/quantize/quantize.h"

namespace nb = nanobind;

namespace dg::ffi {
namespace {

template <typename Pointer>
nb::capsule Capsule(Pointer* pointer) {
  return nb::capsule(reinterpret_cast<void*>(pointer));
}

}  // namespace

void BindQuantize(nb::module_& m) {
  m.def("quantize_handlers", [] {
    nb::dict bundle;
    bundle["instantiate"] = Capsule(QuantizeInstantiate());
    bundle["initialize"] = Capsule(QuantizeInitialize());
    bundle["execute"] = Capsule(QuantizeExecute());
    return bundle;
  });
  m.def("quantize_state_type", [] {
    nb::dict type;
    type["type_id"] = Capsule(QuantizeStateTypeId());
    type["type_info"] = Capsule(QuantizeStateTypeInfo());
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
    const jit::KernelSource source = QuantizeSource(ToQuantizeProblem(problem));
    nb::dict headers;
    for (const jit::NamedText& file : source.headers) {
      headers[nb::str(file.name.data(), file.name.size())] =
          nb::str(file.text.data(), file.text.size());
    }
    return nb::make_tuple(source.text, headers);
  });
}

}  // namespace dg::ffi
