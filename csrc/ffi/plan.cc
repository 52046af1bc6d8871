#include "csrc/ffi/plan.h"

#include <memory>
#include <string>

#include "csrc/gemm/kernel_source.h"
#include "csrc/gemm/select.h"
#include "csrc/jit/environment.h"
#include "csrc/jit/error.h"

namespace dg::ffi {

jit::KernelSource GemmSource(const GemmProblem& problem, const GemmConfig& config) {
  jit::KernelSource source;
  source.name = source.entry = KernelName(problem, config);
  const jit::Environment& environment = jit::GetEnvironment();
  source.text = KernelText(problem, config, {environment.racecheck, environment.stream_only});
  // Without the quantisers': a change to them is no reason to compile a GEMM again.
  for (const KernelFile& file : KernelFiles()) {
    if (file.name.rfind("quantize", 0) != 0) source.headers.push_back({file.name, file.text});
  }
  return source;
}

std::shared_ptr<jit::Kernel> GetGemmKernel(const GemmProblem& problem, const GemmConfig& config) {
  return jit::GetKernel(GemmSource(problem, config), config.smem().total_bytes(), config.threads(),
                        config.cluster_size());
}

Grouping ToGrouping(int64_t number) {
  if (number < static_cast<int64_t>(Grouping::kDense) ||
      number > static_cast<int64_t>(Grouping::kRagged)) {
    throw Error(ErrorCode::kInvalidArgument, "there is no op " + std::to_string(number));
  }
  return static_cast<Grouping>(number);
}

Fp8 ToFp8(int64_t number) {
  if (number < static_cast<int64_t>(Fp8::kE4M3) || number > static_cast<int64_t>(Fp8::kE5M2)) {
    throw Error(ErrorCode::kInvalidArgument, "there is no FP8 type " + std::to_string(number));
  }
  return static_cast<Fp8>(number);
}

GemmConfig PlanGemm(const GemmProblem& problem, const std::optional<GemmConfig>& config) {
  if (const std::string why = WhyUnsupported(problem); !why.empty()) {
    throw Error(ErrorCode::kInvalidArgument, why);
  }
  if (!config) return SelectConfig(problem);
  if (const std::string why = WhyIllegal(problem, *config); !why.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "config: " + why);
  }
  return *config;
}

}  // namespace dg::ffi
