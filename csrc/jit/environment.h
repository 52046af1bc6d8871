// The environment variables, read once per process and nowhere else.
//
// A switch is on for any value but "" and "0". Paths may start with "~".
#pragma once

#include <string>

namespace dg::jit {

// What the user asked for through the environment.
struct Environment {
  // DG_CACHE_DIR, default ~/.jax_deepgemm, as an absolute path; empty when there is no such folder,
  // for want of a home.
  std::string cache_dir;
  // DG_NVCC_COMPILER: path or name of an nvcc to use instead of NVRTC; empty means NVRTC.
  std::string nvcc;
  // NVCC_PREPEND_FLAGS and NVCC_APPEND_FLAGS, which nvcc obeys.
  std::string nvcc_flags;
  // Folder for NVCC's input and output files: TMPDIR, default /tmp.
  std::string temp_dir;
  // Whether the FFMA interleaver runs: unless DG_DISABLE_FFMA_INTERLEAVE is set.
  bool interleave;
  // DG_PTXAS_VERBOSE: print ptxas' resource report of every kernel that comes into use.
  bool ptxas_verbose;
  // DG_PRINT_REG_REUSE: print what the FFMA interleaver found and changed in every kernel that
  // comes into use.
  bool print_reg_reuse;
  // DG_JIT_PRINT_NVCC_COMMAND: print NVCC's command line, or NVRTC's options.
  bool print_command;
  // DG_JIT_DEBUG: print every cache decision and compile.
  bool debug;
  // DG_RACECHECK: make kernels that compute-sanitizer's racecheck can follow, a little slower.
  bool racecheck;
  // DG_STREAM_ONLY: make kernels that only load their operands; their results are garbage.
  bool stream_only;
};

// The environment as it was at the first call.
const Environment& GetEnvironment();

}  // namespace dg::jit
