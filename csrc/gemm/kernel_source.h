// The text of one specialised kernel: constants, the wgmma of its width, and csrc/kernels/gemm.cuh.
// csrc/ffi hands it to the JIT.
#pragma once

#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/gemm/config.h"

namespace dg {

// A file of csrc/kernels, embedded in the extension when it was built.
struct KernelFile {
  std::string_view name;
  std::string_view text;
};

// Every file of csrc/kernels (generated: cmake/embed_kernels.py).
const std::vector<KernelFile>& KernelFiles();

// For names and source text, which must not follow the process' locale: 2112, not 2,112.
std::ostringstream SourceStream();

// The kernel's name, also its symbol: what a profiler shows. For example
// "dg_gemm_fp8_bf16_dense_n2112_k7168_64x64_s12_w1_c1x1x4_r8". Dense kernels for an m that is more
// than the tile's rows and no multiple of them are "dense_parts", unless A is shared.
std::string KernelName(const GemmProblem& problem, const GemmConfig& config);

// Kernels for who examines them.
struct KernelSwitches {
  // Threads that have read a stage say so each for itself, and not one lane for its warp, which
  // racecheck takes for the only one that has.
  bool every_thread_arrives;
  // Stages are filled and freed, nothing is multiplied: how long the loads alone take.
  bool streams_only;
};

// The translation unit that defines it: constants, the wgmma instruction, #include "gemm.cuh".
std::string KernelText(const GemmProblem& problem, const GemmConfig& config,
                       const KernelSwitches& switches);

}  // namespace dg
