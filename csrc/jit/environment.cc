#include "csrc/jit/environment.h"

#include <pwd.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>

namespace dg::jit {
namespace {

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool Switch(const char* name) {
  const std::string value = Variable(name);
  return !value.empty() && value != "0";
}

// Empty when the user has neither HOME nor an entry in the password database.
std::string Home() {
  const std::string home = Variable("HOME");
  if (!home.empty()) return home;
  const passwd* entry = getpwuid(getuid());
  return entry == nullptr || entry->pw_dir == nullptr ? "" : entry->pw_dir;
}

bool StartsAtHome(const std::string& path) { return path == "~" || path.rfind("~/", 0) == 0; }

// Expands "~" and "~/..."; "~user" is not supported and stays as it is.
std::string ExpandHome(const std::string& path) {
  return StartsAtHome(path) ? Home() + path.substr(1) : path;
}

std::string CacheDir() {
  std::string path = Variable("DG_CACHE_DIR");
  if (path.empty()) path = "~/.jax_deepgemm";
  // Without a home, "~/x" is not "/x".
  if (StartsAtHome(path) && Home().empty()) return "";
  // Where the process stands now, wherever it goes.
  std::error_code error;
  const std::filesystem::path absolute = std::filesystem::absolute(ExpandHome(path), error);
  return error ? "" : absolute.string();
}

std::string TempDir() {
  const std::string given = Variable("TMPDIR");
  return given.empty() ? "/tmp" : given;
}

}  // namespace

const Environment& GetEnvironment() {
  static const Environment environment = {
      /*cache_dir=*/CacheDir(),
      /*nvcc=*/ExpandHome(Variable("DG_NVCC_COMPILER")),
      /*nvcc_flags=*/Variable("NVCC_PREPEND_FLAGS") + " " + Variable("NVCC_APPEND_FLAGS"),
      /*temp_dir=*/TempDir(),
      /*interleave=*/!Switch("DG_DISABLE_FFMA_INTERLEAVE"),
      /*ptxas_verbose=*/Switch("DG_PTXAS_VERBOSE"),
      /*print_reg_reuse=*/Switch("DG_PRINT_REG_REUSE"),
      /*print_command=*/Switch("DG_JIT_PRINT_NVCC_COMMAND"),
      /*debug=*/Switch("DG_JIT_DEBUG"),
      /*racecheck=*/Switch("DG_RACECHECK"),
      /*stream_only=*/Switch("DG_STREAM_ONLY"),
  };
  return environment;
}

}  // namespace dg::jit
