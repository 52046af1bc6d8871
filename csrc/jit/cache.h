// Compiled kernels by content: memory first, then <DG_CACHE_DIR>/cache, then the compiler.
//
// The key is a SHA-256 over the source, its headers, the compiler's identity and whether the FFMA
// interleaver runs. One thread of one process compiles a key; the others wait for it. Nothing that
// can go wrong with the disk fails a call: it costs a recompile and one warning.
#pragma once

#include <memory>

#include "csrc/jit/cubin.h"
#include "csrc/jit/source.h"

namespace dg::jit {

// The cubin of `source`; throws Error when it does not compile (and tries again at the next call).
// Call it without Python's GIL, see GetCompiler.
std::shared_ptr<const Cubin> GetOrCompile(const KernelSource& source);

}  // namespace dg::jit
