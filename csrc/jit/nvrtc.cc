// NVRTC behind the Compiler interface: a shared library, loaded at run time.
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "csrc/jit/compiler.h"
#include "csrc/jit/environment.h"
#include "csrc/jit/error.h"
#include "csrc/jit/print.h"

namespace dg::jit {
namespace {

// Header-free kernels for one architecture: everything defaults to the device, and ptxas reports
// what a kernel takes. NOTE: --Ofast-compile would drop setmaxnreg and serialise wgmma.
constexpr std::array<const char*, 5> kOptions = {
    "--gpu-architecture=sm_90a", "-std=c++20",         "--device-as-default-execution-space",
    "--generate-line-info",      "--ptxas-options=-v",
};

// The part of nvrtc.h that is used: the header belongs to the toolkit, which the build does not
// need.
using Result = int;  // nvrtcResult; 0 is NVRTC_SUCCESS.
using Program = struct _nvrtcProgram*;

struct EntryPoints {
  const char* (*get_error_string)(Result);
  Result (*version)(int* major, int* minor);
  Result (*create_program)(Program*, const char* text, const char* name, int num_headers,
                           const char* const* headers, const char* const* include_names);
  Result (*destroy_program)(Program*);
  Result (*compile_program)(Program, int num_options, const char* const* options);
  Result (*get_cubin_size)(Program, std::size_t*);
  Result (*get_cubin)(Program, char*);
  Result (*get_log_size)(Program, std::size_t*);
  Result (*get_log)(Program, char*);
};

template <typename Function>
void Load(void* library, const std::string& path, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) {
    throw Error(ErrorCode::kUnavailable,
                path + " has no " + name + ": jax_deepgemm needs NVRTC 12.0 or newer");
  }
}

// The GNU build id of a loaded library as hex digits: unlike the version, it tells patch releases
// apart, and unlike the file's date it is the same on every machine that shares a cache.
std::string BuildId(const void* symbol) {
  struct Search {
    std::uintptr_t address;
    std::string id;
  } search = {reinterpret_cast<std::uintptr_t>(symbol), ""};
  const auto visit = [](dl_phdr_info* info, std::size_t, void* data) {
    auto* search = static_cast<Search*>(data);
    const auto* begin = info->dlpi_phdr;
    const auto* end = begin + info->dlpi_phnum;
    const bool holds_symbol = std::any_of(begin, end, [&](const ElfW(Phdr) & segment) {
      const std::uintptr_t start = info->dlpi_addr + segment.p_vaddr;
      return segment.p_type == PT_LOAD && search->address - start < segment.p_memsz;
    });
    if (!holds_symbol) return 0;
    for (const auto* segment = begin; segment != end; ++segment) {
      if (segment->p_type != PT_NOTE) continue;
      const auto* note = reinterpret_cast<const char*>(info->dlpi_addr + segment->p_vaddr);
      const char* const notes_end = note + segment->p_memsz;
      const auto aligned = [](std::size_t size) { return (size + 3) / 4 * 4; };
      while (note + sizeof(ElfW(Nhdr)) <= notes_end) {
        ElfW(Nhdr) header;
        std::memcpy(&header, note, sizeof(header));
        const char* name = note + sizeof(header);
        const char* bytes = name + aligned(header.n_namesz);
        note = bytes + aligned(header.n_descsz);
        if (note > notes_end) break;
        if (header.n_type != NT_GNU_BUILD_ID || header.n_namesz != 4) continue;
        if (std::memcmp(name, "GNU", 4) != 0) continue;
        constexpr char kHex[] = "0123456789abcdef";
        for (std::size_t i = 0; i < header.n_descsz; ++i) {
          const auto byte = static_cast<unsigned char>(bytes[i]);
          search->id += kHex[byte >> 4];
          search->id += kHex[byte & 0xf];
        }
      }
    }
    return 1;
  };
  dl_iterate_phdr(visit, &search);
  return search.id;
}

class Nvrtc : public Compiler {
 public:
  explicit Nvrtc(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      throw Error(ErrorCode::kUnavailable, "NVRTC cannot be loaded: " + std::string(dlerror()));
    }
    Load(library, path, "nvrtcGetErrorString", nvrtc_.get_error_string);
    Load(library, path, "nvrtcVersion", nvrtc_.version);
    Load(library, path, "nvrtcCreateProgram", nvrtc_.create_program);
    Load(library, path, "nvrtcDestroyProgram", nvrtc_.destroy_program);
    Load(library, path, "nvrtcCompileProgram", nvrtc_.compile_program);
    Load(library, path, "nvrtcGetCUBINSize", nvrtc_.get_cubin_size);
    Load(library, path, "nvrtcGetCUBIN", nvrtc_.get_cubin);
    Load(library, path, "nvrtcGetProgramLogSize", nvrtc_.get_log_size);
    Load(library, path, "nvrtcGetProgramLog", nvrtc_.get_log);

    int major = 0;
    int minor = 0;
    CheckNvrtc(nvrtc_.version(&major, &minor), "nvrtcVersion");
    kind_ = "NVRTC";
    version_ = std::to_string(major) + "." + std::to_string(minor);
    path_ = path;
    PreloadBuiltins();
    identity_ = "NVRTC " + version_ + " build " +
                BuildId(reinterpret_cast<const void*>(nvrtc_.compile_program));
    for (const char* option : kOptions) identity_ += std::string(" ") + option;
  }

  Cubin Compile(const KernelSource& source) const override;

 private:
  // NVRTC opens its builtins by bare name, which finds the copy beside it only when that is loaded
  // already or NVRTC was linked with a suitable RPATH; pip's packages are not all of the latter
  // kind.
  void PreloadBuiltins() const {
    const std::string folder = path_.substr(0, path_.rfind('/') + 1);
    // A failure shows, with its reason, when NVRTC itself looks for the file.
    dlopen((folder + "libnvrtc-builtins.so." + version_).c_str(), RTLD_NOW | RTLD_GLOBAL);
  }

  void CheckNvrtc(Result result, const char* call) const {
    if (result == 0) return;
    throw Error(ErrorCode::kInternal,
                std::string(call) + ": " + nvrtc_.get_error_string(result) + " (" + path_ + ")");
  }

  std::string Log(Program program) const {
    std::size_t bytes = 0;
    CheckNvrtc(nvrtc_.get_log_size(program, &bytes), "nvrtcGetProgramLogSize");
    std::string log(bytes, '\0');
    CheckNvrtc(nvrtc_.get_log(program, log.data()), "nvrtcGetProgramLog");
    log.resize(std::strlen(log.c_str()));  // The size counts the terminator.
    return log;
  }

  EntryPoints nvrtc_ = {};
};

Cubin Nvrtc::Compile(const KernelSource& source) const {
  if (GetEnvironment().print_command) {
    std::string line = source.name + ": NVRTC";
    for (const char* option : kOptions) line += std::string(" ") + option;
    Print(line);
  }
  std::vector<std::string> strings;  // NVRTC wants terminated strings, the views are not.
  strings.reserve(2 * source.headers.size());
  std::vector<const char*> texts;
  std::vector<const char*> names;
  for (const NamedText& header : source.headers) {
    names.push_back(strings.emplace_back(header.name).c_str());
    texts.push_back(strings.emplace_back(header.text).c_str());
  }

  const auto start = std::chrono::steady_clock::now();
  Program raw = nullptr;
  CheckNvrtc(nvrtc_.create_program(&raw, source.text.c_str(), (source.name + ".cu").c_str(),
                                   static_cast<int>(names.size()), texts.data(), names.data()),
             "nvrtcCreateProgram");
  const auto destroy = [this](Program program) { nvrtc_.destroy_program(&program); };
  const std::unique_ptr<_nvrtcProgram, decltype(destroy)> program(raw, destroy);
  const Result result =
      nvrtc_.compile_program(raw, static_cast<int>(kOptions.size()), kOptions.data());
  Cubin cubin;
  cubin.log = Log(raw);
  if (result != 0) {
    throw Error(ErrorCode::kInternal,
                "nvrtcCompileProgram: " + std::string(nvrtc_.get_error_string(result)) +
                    " while compiling " + source.name + " with NVRTC " + version_ + " (" + path_ +
                    "):\n" + cubin.log);
  }
  std::size_t bytes = 0;
  CheckNvrtc(nvrtc_.get_cubin_size(raw, &bytes), "nvrtcGetCUBINSize");
  cubin.image.resize(bytes);
  CheckNvrtc(nvrtc_.get_cubin(raw, cubin.image.data()), "nvrtcGetCUBIN");
  cubin.compile_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  cubin.entry = source.entry;
  cubin.name = source.name;
  cubin.resources = ParseResources(cubin.log, source.entry);
  return cubin;
}

}  // namespace

std::unique_ptr<Compiler> MakeNvrtc(const std::string& path) {
  return std::make_unique<Nvrtc>(path);
}

}  // namespace dg::jit
