// What the bindings share.
#pragma once

#include <nanobind/nanobind.h>

#include "csrc/jit/source.h"

namespace dg::ffi {

template <typename Pointer>
nanobind::capsule ToCapsule(Pointer* pointer) {
  return nanobind::capsule(reinterpret_cast<void*>(pointer));
}

// The main text, and the files it may include by name.
inline nanobind::tuple ToTuple(const jit::KernelSource& source) {
  nanobind::dict headers;
  for (const jit::NamedText& file : source.headers) {
    headers[nanobind::str(file.name.data(), file.name.size())] =
        nanobind::str(file.text.data(), file.text.size());
  }
  return nanobind::make_tuple(source.text, headers);
}

}  // namespace dg::ffi
