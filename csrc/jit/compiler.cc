#include "csrc/jit/compiler.h"

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "csrc/jit/environment.h"
#include "csrc/jit/error.h"

namespace dg::jit {
namespace {

// Guards both objects. They are never destroyed: the locator holds a Python object, which may not
// be released after the interpreter, and compiles may run on other threads while the process exits.
std::mutex& Mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

std::function<std::string()>& Locator() {
  static auto* locator = new std::function<std::string()>;
  return *locator;
}

std::unique_ptr<Compiler>& Loaded() {
  static auto* compiler = new std::unique_ptr<Compiler>;
  return *compiler;
}

std::unique_ptr<Compiler> MakeCompiler() {
  const std::string& nvcc = GetEnvironment().nvcc;
  if (!nvcc.empty()) return MakeNvcc(nvcc);
  std::function<std::string()> locator;
  {
    const std::lock_guard<std::mutex> lock(Mutex());
    locator = Locator();
  }
  if (!locator) throw Error(ErrorCode::kInternal, "set_nvrtc_locator has not been called");
  return MakeNvrtc(locator());
}

}  // namespace

void SetNvrtcLocator(std::function<std::string()> locator) {
  const std::lock_guard<std::mutex> lock(Mutex());
  Locator() = std::move(locator);
}

const Compiler& GetCompiler() {
  {
    const std::lock_guard<std::mutex> lock(Mutex());
    if (Loaded() != nullptr) return *Loaded();
  }
  // Unlocked, because the locator waits for Python's GIL, whose owner may wait for the lock. Two
  // threads may both get here; the second result is dropped.
  std::unique_ptr<Compiler> made = MakeCompiler();
  const std::lock_guard<std::mutex> lock(Mutex());
  if (Loaded() == nullptr) Loaded() = std::move(made);
  return *Loaded();
}

}  // namespace dg::jit
