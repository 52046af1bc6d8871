// A compiled kernel: what compiler.h produces, cache.h stores and kernel.h loads.
#pragma once

#include <string>
#include <string_view>

namespace dg::jit {

// What one kernel takes of the SM, as ptxas reports it; -1 where its log does not say.
struct Resources {
  int registers = -1;    // Per thread at entry, before setmaxnreg.
  int spill_bytes = -1;  // Spill stores plus spill loads, per thread.
  int stack_bytes = -1;  // Local memory frame, per thread.
  // ptxas serialised the wgmmas, inserted a wait or ignored setmaxnreg: its log has the C75xx
  // lines.
  bool wgmma_serialized = false;
};

// Where a cubin came from.
enum class Origin { kCompiled, kDisk, kMemory };

// "compiled", "disk" or "memory".
constexpr std::string_view OriginName(Origin origin) {
  return origin == Origin::kCompiled ? "compiled" : origin == Origin::kDisk ? "disk" : "memory";
}

// An sm_90a ELF image with what is known about it.
struct Cubin {
  std::string image;             // The ELF file.
  std::string entry;             // Copied from the source.
  std::string name;              // Copied from the source.
  std::string log;               // The compiler's and ptxas' messages.
  std::string ffma_report;       // What the FFMA interleaver did; empty when it did not run.
  Resources resources;           // Parsed from the log.
  std::string path;              // Cache file, empty when the cubin is in memory only.
  double compile_seconds = 0.0;  // Wall time of the compile; 0 for a cache hit.
  Origin origin = Origin::kCompiled;
};

// The resources of `entry` in the log of a compile with ptxas' -v.
Resources ParseResources(std::string_view log, std::string_view entry);

}  // namespace dg::jit
