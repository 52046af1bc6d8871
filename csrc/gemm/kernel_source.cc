#include "csrc/gemm/kernel_source.h"

#include <locale>
#include <sstream>
#include <string>

#include "csrc/gemm/tensor_maps.h"

namespace dg {
namespace {

// wgmma names each of its n / 2 accumulator registers, so its wrapper is spelt out for the one n a
// kernel uses. `accumulate` = 0 overwrites the accumulator; ptxas folds it when it is a constant.
std::string WgmmaFunction(int n, Fp8 a_type, Fp8 b_type) {
  const int registers = n / 2;
  std::ostringstream operands = SourceStream(), outputs = SourceStream();
  for (int i = 0; i < registers; ++i) {
    operands << (i == 0 ? "" : ", ") << "%" << i;
    outputs << (i == 0 ? "" : ", ") << "\"+f\"(d[" << i << "])";
  }
  std::ostringstream text = SourceStream();
  text << "// d += A * B for 64 x " << n << " x 32; a and b are matrix descriptors.\n"
       << "__device__ __forceinline__ void wgmma(float (&d)[" << registers << "],\n"
       << "    unsigned long long a, unsigned long long b, int accumulate) {\n"
       << "  asm volatile(\"{ .reg .pred p; setp.ne.b32 p, %" << registers + 2 << ", 0;\\n\"\n"
       << "    \"wgmma.mma_async.sync.aligned.m64n" << n << "k32.f32." << Fp8Name(a_type) << "."
       << Fp8Name(b_type) << " {" << operands.str() << "}, %" << registers << ", %" << registers + 1
       << ", p, 1, 1; }\"\n"
       << "    : " << outputs.str() << "\n"
       << "    : \"l\"(a), \"l\"(b), \"r\"(accumulate));\n"
       << "}\n";
  return text.str();
}

}  // namespace

std::ostringstream SourceStream() {
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  return stream;
}

std::string KernelName(const GemmProblem& problem, const GemmConfig& config) {
  std::ostringstream name = SourceStream();
  name << "dg_gemm_fp8_bf16_" << GroupingName(problem.grouping);
  if (problem.a_type != Fp8::kE4M3 || problem.b_type != Fp8::kE4M3) {
    name << "_" << Fp8Name(problem.a_type) << "x" << Fp8Name(problem.b_type);
  }
  if (problem.batch_invariant) name << "_invariant";
  if (problem.grouping == Grouping::kDense && HasParts(problem, config)) name << "_parts";
  name << "_n" << problem.n << "_k" << problem.k << "_" << config.block_m << "x" << config.block_n
       << "_s" << config.num_stages << "_w" << config.math_warpgroups << "_c" << config.cluster_m
       << "x" << config.cluster_n << "x" << config.cluster_k << "_r" << config.raster_m;
  return name.str();
}

std::string KernelText(const GemmProblem& problem, const GemmConfig& config,
                       const KernelSwitches& switches) {
  std::ostringstream text = SourceStream();
  const auto constant = [&](const char* name, int64_t value) {
    text << "constexpr int " << name << " = " << value << ";\n";
  };
  text << "namespace dg::config {\n";
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
  text << "}  // namespace dg::config\n\n"
       << "namespace dg {\n"
       << WgmmaFunction(config.smem().warpgroup_n(), problem.a_type, problem.b_type)
       << "}  // namespace dg\n\n"
       << "#define DG_KERNEL_NAME " << KernelName(problem, config) << "\n"
       << "#include \"gemm.cuh\"\n";
  return text.str();
}

}  // namespace dg
