#include "csrc/jit/environment.h"

#include <pwd.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <string_view>

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

// Expands "~" and "~/..."; "~user" is not supported and stays as it is.
std::string ExpandHome(const std::string& path) {
  const bool starts_at_home = path == "~" || path.rfind("~/", 0) == 0;
  return starts_at_home ? Home() + path.substr(1) : path;
}

std::string CacheDir() {
  const std::string given = ExpandHome(Variable("DG_CACHE_DIR"));
  if (!given.empty()) return given;
  const std::string home = Home();
  return home.empty() ? "" : home + "/.jax_deepgemm";
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
