// Python's view of csrc/jit: compile, toolchain, devices; csrc/ffi/module.cc calls it once.
#pragma once

#include <nanobind/nanobind.h>

namespace dg::ffi {

// Adds Error, set_nvrtc_locator, jit_compile, interleave, digest, toolchain, cache_dir,
// cuda_devices, loaded_libraries and launches to `m`.
void BindJit(nanobind::module_& m);

}  // namespace dg::ffi
