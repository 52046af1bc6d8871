// From a problem to a compiled kernel: where csrc/gemm (what to run) meets csrc/jit (how it gets
// compiled). handlers.cc plans for XLA, module.cc for Python.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "csrc/gemm/config.h"
#include "csrc/jit/kernel.h"
#include "csrc/jit/source.h"

namespace dg::ffi {

// What the JIT compiles for `config`: the one place that puts it together, so that a kernel
// compiled ahead of time is found again when a program needs it.
jit::KernelSource GemmSource(const GemmProblem& problem, const GemmConfig& config);

// The process' kernel for `config`, one for all who own it at the same time. Throws Error.
std::shared_ptr<jit::Kernel> GetGemmKernel(const GemmProblem& problem, const GemmConfig& config);

// The grouping of that number; throws Error if there is none.
Grouping ToGrouping(int64_t number);

// The FP8 type of that number; throws Error if there is none.
Fp8 ToFp8(int64_t number);

// `config` if given and legal, else the selected one; throws Error naming what is wrong.
GemmConfig PlanGemm(const GemmProblem& problem, const std::optional<GemmConfig>& config);

}  // namespace dg::ffi
