// NVCC behind the Compiler interface: a child process, started without a shell.
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "csrc/jit/compiler.h"
#include "csrc/jit/environment.h"
#include "csrc/jit/error.h"
#include "csrc/jit/file.h"
#include "csrc/jit/print.h"

extern char** environ;

namespace dg::jit {
namespace {

// As NVRTC's. NVCC has no --device-as-default-execution-space; constexpr functions of headers that
// host and device share are let through instead.
const std::vector<std::string>& Options() {
  static const auto* options = new std::vector<std::string>{"-gencode=arch=compute_90a,code=sm_90a",
                                                            "-cubin",
                                                            "-std=c++20",
                                                            "--expt-relaxed-constexpr",
                                                            "--generate-line-info",
                                                            "--ptxas-options=-v"};
  return *options;
}

std::string Join(const std::vector<std::string>& words) {
  std::string line;
  for (const std::string& word : words) line += (line.empty() ? "" : " ") + word;
  return line;
}

// The bytes of a file that must be there.
std::string Read(const std::string& path) {
  std::optional<std::string> bytes = ReadFile(path);
  if (!bytes) throw Error(ErrorCode::kInternal, "cannot read " + path);
  return *std::move(bytes);
}

void Write(const std::string& path, std::string_view bytes) {
  const int created = CreateFolders(path.substr(0, path.rfind('/')));
  const int error = created != 0 ? created : ReplaceFile(path, bytes);
  if (error != 0) {
    throw Error(ErrorCode::kInternal, "cannot write " + path + ": " + std::strerror(error));
  }
}

struct Outcome {
  int status;  // As from waitpid.
  std::string output;
};

// Runs a command to its end; stdout and stderr go to `output_file`. Throws Error when it cannot be
// started.
Outcome Run(const std::vector<std::string>& command, const std::string& output_file) {
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, output_file.c_str(),
                                   O_WRONLY | O_CREAT | O_TRUNC, 0600);
  posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
  pid_t child = 0;
  const int error = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    throw Error(ErrorCode::kUnavailable,
                "DG_NVCC_COMPILER: cannot run " + command.front() + ": " + std::strerror(error));
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    // Where the process ignores SIGCHLD, or reaps all children, how this one ended is not known;
    // what it was to make says it.
    if (errno == ECHILD) break;
    if (errno != EINTR) {
      throw Error(ErrorCode::kInternal, "waitpid: " + std::string(std::strerror(errno)));
    }
  }
  return {status, Read(output_file)};
}

// "exit status 2" or "signal 9".
std::string Describe(int status) {
  return WIFSIGNALED(status) ? "signal " + std::to_string(WTERMSIG(status))
                             : "exit status " + std::to_string(WEXITSTATUS(status));
}

class Nvcc : public Compiler {
 public:
  explicit Nvcc(const std::string& path) {
    const PrivateFolder folder(GetEnvironment().temp_dir);
    const Outcome outcome = Run({path, "--version"}, folder.path() + "/log");
    // "Cuda compilation tools, release 13.0, V13.0.88"
    const std::size_t v = outcome.output.find(", V");
    if (outcome.status != 0 || v == std::string::npos) {
      throw Error(ErrorCode::kUnavailable, "DG_NVCC_COMPILER: " + path +
                                               " --version is not an nvcc's (" +
                                               Describe(outcome.status) + "):\n" + outcome.output);
    }
    const std::size_t begin = v + 3;
    kind_ = "NVCC";
    version_ = outcome.output.substr(
        begin, outcome.output.find_first_not_of("0123456789.", begin) - begin);
    path_ = path;
    identity_ = "NVCC " + version_ + " " + Join(Options()) + " " + GetEnvironment().nvcc_flags;
  }

  Cubin Compile(const KernelSource& source) const override;
};

Cubin Nvcc::Compile(const KernelSource& source) const {
  const auto start = std::chrono::steady_clock::now();
  const PrivateFolder folder(GetEnvironment().temp_dir);
  const std::string include = folder.path() + "/include";
  for (const NamedText& header : source.headers) {
    Write(include + "/" + std::string(header.name), header.text);
  }
  const std::string input = folder.path() + "/" + source.name + ".cu";
  const std::string output = folder.path() + "/" + source.name + ".cubin";
  Write(input, source.text);

  std::vector<std::string> command = {path_};
  command.insert(command.end(), Options().begin(), Options().end());
  command.insert(command.end(), {"-I" + include, "-o", output, input});
  if (GetEnvironment().print_command) Print(source.name + ": " + Join(command));
  const Outcome outcome = Run(command, folder.path() + "/log");
  std::optional<std::string> image = ReadFile(output);
  if (outcome.status != 0 || !image) {
    throw Error(ErrorCode::kInternal, "nvcc: " + Describe(outcome.status) + " while compiling " +
                                          source.name + " with NVCC " + version_ + " (" + path_ +
                                          "):\n" + outcome.output);
  }
  Cubin cubin;
  cubin.image = *std::move(image);
  cubin.log = outcome.output;
  cubin.compile_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  cubin.entry = source.entry;
  cubin.name = source.name;
  cubin.resources = ParseResources(cubin.log, source.entry);
  return cubin;
}

}  // namespace

std::unique_ptr<Compiler> MakeNvcc(const std::string& path) { return std::make_unique<Nvcc>(path); }

}  // namespace dg::jit
