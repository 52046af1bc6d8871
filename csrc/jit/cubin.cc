#include "csrc/jit/cubin.h"

#include <cstdlib>
#include <string>
#include <string_view>

namespace dg::jit {
namespace {

// The number right before `unit` in `line`, -1 if there is none.
int NumberBefore(std::string_view line, std::string_view unit) {
  const std::size_t end = line.find(unit);
  if (end == std::string_view::npos) return -1;
  std::size_t begin = end;
  while (begin > 0 && line[begin - 1] >= '0' && line[begin - 1] <= '9') --begin;
  return begin == end ? -1 : std::atoi(std::string(line.substr(begin, end - begin)).c_str());
}

// The line of `text` that contains `needle`, empty if there is none.
std::string_view LineWith(std::string_view text, std::string_view needle) {
  const std::size_t hit = text.find(needle);
  if (hit == std::string_view::npos) return {};
  const std::size_t newline = text.rfind('\n', hit);
  const std::size_t begin = newline == std::string_view::npos ? 0 : newline + 1;
  return text.substr(begin, text.find('\n', hit) - begin);
}

}  // namespace

// The part of the log that is read:
//   ptxas info    : Compiling entry function 'gemm' for 'sm_90a'
//   ptxas info    : Function properties for gemm
//       0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
//   ptxas info    : Used 168 registers, used 16 barriers, 16 bytes smem
Resources ParseResources(std::string_view log, std::string_view entry) {
  Resources resources;
  resources.wgmma_serialized = log.find("(C75") != std::string_view::npos;

  const std::string heading = "Compiling entry function '" + std::string(entry) + "'";
  const std::size_t begin = log.find(heading);
  if (begin == std::string_view::npos) return resources;
  std::string_view report = log.substr(begin + heading.size());
  report = report.substr(0, report.find("Compiling entry function"));

  // Functions that were not inlined have property lines of their own.
  const std::size_t properties =
      report.find("Function properties for " + std::string(entry) + "\n");
  if (properties != std::string_view::npos) {
    const std::string_view frame = LineWith(report.substr(properties), " bytes stack frame");
    resources.stack_bytes = NumberBefore(frame, " bytes stack frame");
    const int stores = NumberBefore(frame, " bytes spill stores");
    const int loads = NumberBefore(frame, " bytes spill loads");
    if (stores >= 0 && loads >= 0) resources.spill_bytes = stores + loads;
  }
  resources.registers = NumberBefore(LineWith(report, " registers"), " registers");
  return resources;
}

}  // namespace dg::jit
