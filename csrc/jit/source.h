// A kernel as text, before it is compiled: what csrc/gemm produces and compiler.h consumes.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace dg::jit {

// A file the kernel may include as #include "name"; both views must outlive the compile (they point
// into the sources embedded in the extension).
struct NamedText {
  std::string_view name;
  std::string_view text;
};

// One kernel to compile for sm_90a.
struct KernelSource {
  std::string name;                // Label in messages and file names: letters, digits, "._-".
  std::string entry;               // The extern "C" __global__ function.
  std::string text;                // The main translation unit, constants included.
  std::vector<NamedText> headers;  // Everything the text includes, directly or not.
};

}  // namespace dg::jit
