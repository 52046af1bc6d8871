#include "csrc/jit/cache.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <future>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "csrc/jit/compiler.h"
#include "csrc/jit/digest.h"
#include "csrc/jit/environment.h"
#include "csrc/jit/error.h"
#include "csrc/jit/file.h"
#include "csrc/jit/interleave.h"
#include "csrc/jit/print.h"

namespace dg::jit {
namespace {

using SharedCubin = std::shared_ptr<const Cubin>;

// Changes whenever cache files or the passes that make them do.
constexpr char kFormat[] = "jax_deepgemm cubin 3";

// How long to wait for another process that compiles the same kernel; a compile takes well under a
// second with NVRTC, some seconds with NVCC.
constexpr double kLockPatienceSeconds = 60;

void Debug(const KernelSource& source, std::string_view decision) {
  if (GetEnvironment().debug) Print("jit: " + source.name + ": " + std::string(decision));
}

// One warning per process, whatever goes wrong with the disk and however often.
void WarnOnce(const std::string& problem) {
  static std::atomic<bool> warned{false};
  if (!warned.exchange(true)) Print("warning: " + problem);
}

std::string Key(const KernelSource& source, const Compiler& compiler) {
  Sha256 sha;
  sha.UpdateField(kFormat);
  sha.UpdateField(compiler.identity());  // The options are part of it.
  sha.UpdateField(GetEnvironment().interleave ? "interleaved" : "as compiled");
  sha.UpdateField(source.name);
  sha.UpdateField(source.entry);
  sha.UpdateField(source.text);
  for (const NamedText& header : source.headers) {
    sha.UpdateField(header.name);
    sha.UpdateField(header.text);
  }
  return sha.HexDigest();
}

// A cache file is image, log, FFMA report, footer. With the ELF image first, cuobjdump and nvdisasm
// read it as it is; with the footer last, no truncated file has one.
std::string Footer(const std::string& key, std::string_view image, std::string_view log,
                   std::string_view ffma_report) {
  char sizes[64];
  std::snprintf(sizes, sizeof(sizes), "%016zx %016zx %016zx", image.size(), log.size(),
                ffma_report.size());
  Sha256 sha;
  sha.UpdateField(image);
  sha.UpdateField(log);
  sha.UpdateField(ffma_report);
  return std::string("\n") + kFormat + "\n" + key + "\n" + sha.HexDigest() + "\n" + sizes + "\n";
}

constexpr std::size_t kSizesBytes = 3 * (16 + 1);
constexpr std::size_t kFooterBytes = 1 + sizeof(kFormat) + 65 + 65 + kSizesBytes;

// The cubin in `path`, or null with the reason in `defect` (empty if there is no such file).
std::shared_ptr<Cubin> ReadCubin(const std::string& path, const std::string& key,
                                 const KernelSource& source, std::string* defect) {
  const std::optional<std::string> file = ReadFile(path);
  if (!file) return nullptr;
  *defect = "truncated";
  if (file->size() < kFooterBytes) return nullptr;
  const char* sizes = file->data() + file->size() - kSizesBytes;
  const std::size_t image_bytes = std::strtoull(sizes, nullptr, 16);
  const std::size_t log_bytes = std::strtoull(sizes + 17, nullptr, 16);
  const std::size_t payload_bytes = file->size() - kFooterBytes;
  if (image_bytes > payload_bytes || log_bytes > payload_bytes - image_bytes) return nullptr;
  const std::string_view payload = std::string_view(*file).substr(0, payload_bytes);
  const std::string_view image = payload.substr(0, image_bytes);
  const std::string_view log = payload.substr(image_bytes, log_bytes);
  const std::string_view ffma_report = payload.substr(image_bytes + log_bytes);
  // The footer holds all there is to check: format, key, sizes and checksum.
  *defect = "not what was written";
  const std::string footer = Footer(key, image, log, ffma_report);
  if (file->compare(payload_bytes, kFooterBytes, footer) != 0) return nullptr;

  defect->clear();
  auto cubin = std::make_shared<Cubin>();
  cubin->image = image;
  cubin->entry = source.entry;
  cubin->name = source.name;
  cubin->log = log;
  cubin->ffma_report = ffma_report;
  cubin->resources = ParseResources(cubin->log, source.entry);
  cubin->path = path;
  cubin->origin = Origin::kDisk;
  return cubin;
}

std::string FfmaReport(const std::string& name, const std::vector<FfmaRun>& runs) {
  std::string text = "FFMA runs of " + name + ": " + std::to_string(runs.size());
  for (const FfmaRun& run : runs) {
    char line[256];
    std::snprintf(line, sizeof(line), "\n  %s+0x%zx: %d FFMA, reuse %d -> %d, yield %d -> %d%s",
                  run.section.c_str(), run.offset, run.length, run.reuse_before, run.reuse_after,
                  run.yield_before, run.yield_after, run.alternates ? "" : " (as compiled)");
    text += line;
  }
  return text;
}

std::shared_ptr<Cubin> Compile(const KernelSource& source, const Compiler& compiler) {
  auto cubin = std::make_shared<Cubin>(compiler.Compile(source));
  if (GetEnvironment().interleave) {
    cubin->ffma_report = FfmaReport(source.name, InterleaveFfma(cubin->image));
  }
  char decision[128];
  std::snprintf(decision, sizeof(decision), "compiled in %.3f s by %s %s", cubin->compile_seconds,
                compiler.kind().c_str(), compiler.version().c_str());
  Debug(source, decision);
  return cubin;
}

// Compiles and stores at `path`; the caller holds the key's lock if there is one.
std::shared_ptr<Cubin> CompileAndStore(const KernelSource& source, const Compiler& compiler,
                                       const std::string& key, const std::string& path) {
  std::shared_ptr<Cubin> cubin = Compile(source, compiler);
  const std::string footer = Footer(key, cubin->image, cubin->log, cubin->ffma_report);
  const int error = ReplaceFile(path, cubin->image + cubin->log + cubin->ffma_report + footer);
  if (error == 0) {
    cubin->path = path;
    Debug(source, "written to " + path);
  } else {
    WarnOnce("cannot write " + path + ": " + std::strerror(error) +
             "; compiled kernels are kept in memory only");
  }
  return cubin;
}

std::shared_ptr<Cubin> ReadOrCompile(const KernelSource& source, const Compiler& compiler,
                                     const std::string& key) {
  if (GetEnvironment().cache_dir.empty()) {
    WarnOnce(
        "no cache folder, because DG_CACHE_DIR names none and the user has no home; compiled "
        "kernels are kept in memory only");
    return Compile(source, compiler);
  }
  const std::string folder = GetEnvironment().cache_dir + "/cache";
  const std::string path = folder + "/" + source.name + "-" + key + ".cubin";
  std::string defect;
  std::shared_ptr<Cubin> cubin = ReadCubin(path, key, source, &defect);
  if (cubin == nullptr) {
    if (const int error = CreateFolders(folder); error != 0) {
      WarnOnce("cannot create the cache folder " + folder + ": " + std::strerror(error) +
               "; compiled kernels are kept in memory only");
      return Compile(source, compiler);
    }
    const FileLock lock(path + ".lock", kLockPatienceSeconds);
    // Another process may have written the file since.
    cubin = ReadCubin(path, key, source, &defect);
    if (!defect.empty()) Debug(source, path + " is " + defect + ": replacing it");
    if (cubin == nullptr) {
      cubin = CompileAndStore(source, compiler, key, path);
      // Second, because where nothing can be written, the warning about that is the one to give.
      if (lock.error() != 0) {
        WarnOnce("cannot lock " + path + ".lock: " + std::strerror(lock.error()) +
                 "; several processes may compile the same kernel");
      }
      return cubin;
    }
  }
  Debug(source, "disk hit " + path);
  return cubin;
}

// What comes into use for the first time in this process: printed once per kernel, hit or compile.
void PrintReports(const Cubin& cubin) {
  if (GetEnvironment().ptxas_verbose) Print("ptxas report of " + cubin.name + "\n" + cubin.log);
  if (GetEnvironment().print_reg_reuse && !cubin.ffma_report.empty()) Print(cubin.ffma_report);
}

void CheckName(const std::string& name) {
  constexpr char kSafe[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
  if (name.empty() || name.front() == '.' || name.find_first_not_of(kSafe) != std::string::npos) {
    throw Error(ErrorCode::kInvalidArgument,
                "kernel name must be letters, digits and . _ -, got '" + name + "'");
  }
}

// Kernels of this process by key, finished or being compiled. Never destroyed, because compiles may
// run on other threads while the process exits.
struct Memory {
  std::mutex mutex;
  std::unordered_map<std::string, std::shared_future<SharedCubin>> cubins;
};

Memory& GetMemory() {
  static auto* memory = new Memory;
  return *memory;
}

}  // namespace

std::shared_ptr<const Cubin> GetOrCompile(const KernelSource& source) {
  CheckName(source.name);
  const Compiler& compiler = GetCompiler();
  const std::string key = Key(source, compiler);
  Memory& memory = GetMemory();
  std::promise<SharedCubin> promise;
  std::shared_future<SharedCubin> known;
  {
    const std::lock_guard<std::mutex> lock(memory.mutex);
    const auto [slot, is_new] = memory.cubins.try_emplace(key);
    if (is_new) {
      slot->second = promise.get_future().share();
    } else {
      known = slot->second;
    }
  }
  if (known.valid()) {
    SharedCubin cubin = known.get();
    Debug(source, "memory hit");
    return cubin;
  }
  try {
    const std::shared_ptr<Cubin> cubin = ReadOrCompile(source, compiler, key);
    PrintReports(*cubin);
    auto remembered = std::make_shared<Cubin>(*cubin);
    remembered->origin = Origin::kMemory;
    remembered->compile_seconds = 0.0;
    promise.set_value(std::move(remembered));
    return cubin;
  } catch (...) {
    // Forgotten before the waiting threads hear of it, so that their next call tries again.
    {
      const std::lock_guard<std::mutex> lock(memory.mutex);
      memory.cubins.erase(key);
    }
    promise.set_exception(std::current_exception());
    throw;
  }
}

}  // namespace dg::jit
