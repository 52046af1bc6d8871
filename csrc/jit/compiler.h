// Kernel source to sm_90a cubin, by NVRTC or by NVCC; cache.h is its only user in normal runs.
//
// NVRTC is the default: loaded at run time from the path the locator returns, headers handed over
// in memory, no toolkit and no GPU needed. DG_NVCC_COMPILER selects an nvcc instead.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "csrc/jit/cubin.h"
#include "csrc/jit/source.h"

namespace dg::jit {

// A compiler with one fixed version and set of options.
class Compiler {
 public:
  virtual ~Compiler() = default;

  // "NVRTC" or "NVCC".
  const std::string& kind() const { return kind_; }

  // Version for people, such as "13.0".
  const std::string& version() const { return version_; }

  // The shared library or executable.
  const std::string& path() const { return path_; }

  // Everything that can change the cubin of a given source: kind, exact build and options.
  const std::string& identity() const { return identity_; }

  // Compiles; throws Error with the log when the source has errors. Safe from many threads.
  virtual Cubin Compile(const KernelSource& source) const = 0;

 protected:
  Compiler() = default;

  std::string kind_;
  std::string version_;
  std::string path_;
  std::string identity_;
};

// Sets the function that returns the path of libnvrtc or throws Error saying how to get it. It is
// called outside any lock that a thread holding Python's GIL could wait for.
void SetNvrtcLocator(std::function<std::string()> locator);

// The compiler the environment asks for, loaded at the first call; a failure is tried again at the
// next one. Call it without Python's GIL: the locator takes it.
const Compiler& GetCompiler();

// The two compilers; throw Error when the library or executable at `path` cannot be used.
std::unique_ptr<Compiler> MakeNvrtc(const std::string& path);  // nvrtc.cc
std::unique_ptr<Compiler> MakeNvcc(const std::string& path);   // nvcc.cc

}  // namespace dg::jit
