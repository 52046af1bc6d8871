// Lines for the user on stderr: one write each, so that lines of many threads do not mix.
#pragma once

#include <string_view>

namespace dg::jit {

// Writes "jax_deepgemm: <text>\n".
void Print(std::string_view text);

}  // namespace dg::jit
