#include "csrc/ffi/plan.h"

#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "csrc/gemm/kernel_source.h"
#include "csrc/gemm/select.h"
#include "csrc/jit/cache.h"
#include "csrc/jit/cubin.h"
#include "csrc/jit/environment.h"
#include "csrc/jit/error.h"

namespace dg::ffi {

jit::KernelSource GemmSource(const GemmProblem& problem, const GemmConfig& config) {
  jit::KernelSource source;
  source.name = source.entry = KernelName(problem, config);
  source.text = KernelText(problem, config, jit::GetEnvironment().racecheck);
  for (const KernelFile& file : KernelFiles()) source.headers.push_back({file.name, file.text});
  return source;
}

std::shared_ptr<jit::Kernel> GetGemmKernel(const GemmProblem& problem, const GemmConfig& config) {
  // Never destroyed: states that the process' end destroys may come later.
  static auto* const mutex = new std::mutex;
  static auto* const kernels = new std::map<std::string, std::weak_ptr<jit::Kernel>>;
  const std::string name = KernelName(problem, config);
  {
    const std::lock_guard<std::mutex> lock(*mutex);
    const auto found = kernels->find(name);
    if (found != kernels->end()) {
      if (std::shared_ptr<jit::Kernel> kernel = found->second.lock()) return kernel;
    }
  }
  // Compile outside the lock: other kernels need not wait.
  std::shared_ptr<const jit::Cubin> cubin = jit::GetOrCompile(GemmSource(problem, config));
  auto made = std::make_shared<jit::Kernel>(std::move(cubin), config.smem().total_bytes(),
                                            config.threads(), config.cluster_size());
  const std::lock_guard<std::mutex> lock(*mutex);
  for (auto entry = kernels->begin(); entry != kernels->end();) {
    entry = entry->second.expired() ? kernels->erase(entry) : std::next(entry);
  }
  std::weak_ptr<jit::Kernel>& slot = (*kernels)[name];
  if (std::shared_ptr<jit::Kernel> kernel = slot.lock()) return kernel;  // another thread's
  slot = made;
  return made;
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
