// The part of the extension module that is about quantisers.
#pragma once

#include <nanobind/nanobind.h>

namespace dg::ffi {

// Adds quantize_handlers, quantize_state_type, their names, and what Python asks about kernels to
// `m`.
void BindQuantize(nanobind::module_& m);

}  // namespace dg::ffi
