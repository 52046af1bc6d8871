#include "csrc/gemm/kernel_source.h"

#include <cstdint>
#include <string>

#include "csrc/gemm/tensor_maps.h"

namespace dg {
namespace {

// Numbers are spelt by std::to_string: streams would follow the process' locale, "2,112" for one.

// wgmma names each of its n / 2 accumulator registers, so its wrapper is spelt out for the one n a
// kernel uses. `accumulate` = 0 overwrites the accumulator; ptxas folds it when it is a constant.
std::string WgmmaFunction(int n, Fp8 a_type, Fp8 b_type) {
  const int registers = n / 2;
  const std::string count = std::to_string(registers);
  const auto operand = [&](int behind) { return "%" + std::to_string(registers + behind); };
  std::string operands, outputs;
  for (int i = 0; i < registers; ++i) {
    const std::string comma = i == 0 ? "" : ", ";
    operands += comma + "%" + std::to_string(i);
    outputs += comma + "\"+f\"(d[" + std::to_string(i) + "])";
  }
  return "// d += A * B for 64 x " + std::to_string(n) +
         " x 32; a and b are matrix descriptors.\n"
         "__device__ __forceinline__ void wgmma(float (&d)[" +
         count +
         "],\n"
         "    unsigned long long a, unsigned long long b, int accumulate) {\n"
         "  asm volatile(\"{ .reg .pred p; setp.ne.b32 p, " +
         operand(2) +
         ", 0;\\n\"\n"
         "    \"wgmma.mma_async.sync.aligned.m64n" +
         std::to_string(n) + "k32.f32." + Fp8Name(a_type) + "." + Fp8Name(b_type) + " {" +
         operands + "}, " + operand(0) + ", " + operand(1) +
         ", p, 1, 1; }\"\n"
         "    : " +
         outputs +
         "\n"
         "    : \"l\"(a), \"l\"(b), \"r\"(accumulate));\n"
         "}\n";
}

}  // namespace

std::string KernelName(const GemmProblem& problem, const GemmConfig& config) {
  std::string name = "dg_gemm_fp8_bf16_" + std::string(GroupingName(problem.grouping));
  if (problem.a_type != Fp8::kE4M3 || problem.b_type != Fp8::kE4M3) {
    name += "_" + std::string(Fp8Name(problem.a_type)) + "x" + Fp8Name(problem.b_type);
  }
  if (problem.batch_invariant) name += "_invariant";
  if (problem.grouping == Grouping::kDense && HasParts(problem, config)) name += "_parts";
  const auto number = [&](const char* before, int64_t value) {
    name += before + std::to_string(value);
  };
  number("_n", problem.n);
  number("_k", problem.k);
  number("_", config.block_m);
  number("x", config.block_n);
  number("_s", config.num_stages);
  number("_w", config.math_warpgroups);
  number("_c", config.cluster_m);
  number("x", config.cluster_n);
  number("x", config.cluster_k);
  number("_r", config.raster_m);
  return name;
}

std::string KernelText(const GemmProblem& problem, const GemmConfig& config,
                       const KernelSwitches& switches) {
  std::string text = "namespace dg::config {\n";
  const auto constant = [&](const char* name, int64_t value) {
    text += "constexpr int " + std::string(name) + " = " + std::to_string(value) + ";\n";
  };
  constant("kGrouping", static_cast<int>(problem.grouping));
  constant("kN", problem.n);
  constant("kK", problem.k);
  constant("kBlockM", config.block_m);
  constant("kBlockN", config.block_n);
  constant("kNumStages", config.num_stages);
  constant("kMathWarpgroups", config.math_warpgroups);
  constant("kClusterM", config.cluster_m);
  constant("kClusterN", config.cluster_n);
  constant("kClusterK", config.cluster_k);
  constant("kRasterM", config.raster_m);
  constant("kRotatesK", problem.grouping == Grouping::kDense && !problem.batch_invariant);
  constant("kHasParts", HasParts(problem, config));
  constant("kArrivalsPerWarp", switches.every_thread_arrives ? 32 : 1);
  constant("kStreamsOnly", switches.streams_only);
  text +=
      "}  // namespace dg::config\n\n"
      "namespace dg {\n" +
      WgmmaFunction(config.smem().warpgroup_n(), problem.a_type, problem.b_type) +
      "}  // namespace dg\n\n"
      "#define DG_KERNEL_NAME " +
      KernelName(problem, config) +
      "\n"
      "#include \"gemm.cuh\"\n";
  return text;
}

}  // namespace dg
