#include "csrc/jit/print.h"

#include <cstdio>
#include <string>
#include <string_view>

namespace dg::jit {

void Print(std::string_view text) {
  const std::string line = "jax_deepgemm: " + std::string(text) + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
}

}  // namespace dg::jit
