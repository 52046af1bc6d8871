#include "csrc/ffi/jit_bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/jit/cache.h"
#include "csrc/jit/compiler.h"
#include "csrc/jit/cubin.h"
#include "csrc/jit/digest.h"
#include "csrc/jit/driver.h"
#include "csrc/jit/environment.h"
#include "csrc/jit/error.h"
#include "csrc/jit/interleave.h"
#include "csrc/jit/kernel.h"
#include "csrc/jit/source.h"

namespace nb = nanobind;

namespace dg::ffi {
namespace {

nb::bytes ToBytes(std::string_view text) { return nb::bytes(text.data(), text.size()); }

// Lets C++ threads that do not hold the GIL call `locate() -> str`. The callable is kept for ever:
// it may not be released without the interpreter, which other threads can outlive.
void SetNvrtcLocator(nb::callable locate) {
  PyObject* const callable = locate.release().ptr();
  jit::SetNvrtcLocator([callable]() -> std::string {
    const nb::gil_scoped_acquire gil;
    try {
      return nb::cast<std::string>(nb::handle(callable)());
    } catch (nb::python_error& error) {
      // The message alone: the locator's errors are written for the user.
      const std::string message = nb::cast<std::string>(nb::str(error.value()));
      throw Error(ErrorCode::kUnavailable, message);
    }
  });
}

nb::dict JitCompile(const std::string& name, const std::string& entry, const std::string& text,
                    const std::map<std::string, std::string>& headers) {
  jit::KernelSource source = {name, entry, text, {}};
  for (const auto& [header, contents] : headers) source.headers.push_back({header, contents});
  const std::shared_ptr<const jit::Cubin> cubin = [&] {
    const nb::gil_scoped_release no_gil;
    return jit::GetOrCompile(source);
  }();
  nb::dict resources;
  resources["registers"] = cubin->resources.registers;
  resources["spill_bytes"] = cubin->resources.spill_bytes;
  resources["stack_bytes"] = cubin->resources.stack_bytes;
  resources["wgmma_serialized"] = cubin->resources.wgmma_serialized;
  const std::string_view origin = jit::OriginName(cubin->origin);
  nb::dict result;
  result["name"] = cubin->name;
  result["origin"] = nb::str(origin.data(), origin.size());
  result["resources"] = resources;
  result["log"] = cubin->log;
  result["path"] = cubin->path;
  result["compile_seconds"] = cubin->compile_seconds;
  result["image"] = ToBytes(cubin->image);
  return result;
}

nb::tuple Interleave(const nb::bytes& cubin) {
  std::string image(cubin.c_str(), cubin.size());
  nb::list stats;
  for (const jit::FfmaRun& run : jit::InterleaveFfma(image)) {
    nb::dict entry;
    entry["section"] = run.section;
    entry["offset"] = run.offset;
    entry["length"] = run.length;
    entry["reuse_before"] = run.reuse_before;
    entry["reuse_after"] = run.reuse_after;
    entry["yield_before"] = run.yield_before;
    entry["yield_after"] = run.yield_after;
    entry["alternates"] = run.alternates;
    stats.append(entry);
  }
  return nb::make_tuple(ToBytes(image), stats);
}

nb::dict Toolchain() {
  const jit::Compiler* const compiler = [] {
    const nb::gil_scoped_release no_gil;
    return &jit::GetCompiler();
  }();
  nb::dict result;
  result["compiler"] = compiler->kind();
  result["version"] = compiler->version();
  result["path"] = compiler->path();
  result["cache_dir"] = jit::GetEnvironment().cache_dir;
  return result;
}

nb::list CudaDevices() {
  const std::vector<jit::Device> devices = [] {
    const nb::gil_scoped_release no_gil;
    return jit::ListDevices();
  }();
  nb::list result;
  for (const jit::Device& device : devices) {
    nb::dict entry;
    entry["name"] = device.name;
    entry["ordinal"] = device.ordinal;
    entry["major"] = device.major;
    entry["minor"] = device.minor;
    entry["num_sms"] = device.num_sms;
    entry["memory_gbs"] = device.memory_gbs;
    result.append(entry);
  }
  return result;
}

}  // namespace

void BindJit(nb::module_& m) {
  nb::exception<Error>(m, "Error", PyExc_RuntimeError);
  m.def("set_nvrtc_locator", &SetNvrtcLocator, nb::arg("locate"),
        "Registers the function that returns libnvrtc's path or raises; called at the first "
        "compile.");
  m.def("jit_compile", &JitCompile, nb::arg("name"), nb::arg("entry"), nb::arg("text"),
        nb::arg("headers"),
        "Compiles a kernel for sm_90a through the cache; returns name, origin, resources, log, "
        "path, compile_seconds and image.");
  m.def("interleave", &Interleave, nb::arg("cubin"),
        "Runs the FFMA interleaver on a cubin; returns the new cubin and one dict per FFMA run.");
  m.def(
      "digest",
      [](const nb::bytes& data, bool portable) {
        return jit::Sha256Hex(std::string_view(data.c_str(), data.size()), portable);
      },
      nb::arg("data"), nb::arg("portable") = false,
      "SHA-256 as hex digits, for tests of what cache keys are made with.");
  m.def("toolchain", &Toolchain,
        "The kernel compiler, loaded if it is not yet: compiler, version, path, cache_dir.");
  m.def(
      "cache_dir", [] { return jit::GetEnvironment().cache_dir; },
      "DG_CACHE_DIR or its default; empty when there is neither the variable nor a home folder.");
  m.def("loaded_libraries", &jit::LoadedLibraries,
        "How many libraries of kernels are loaded; they go with the executables that own them.");
  m.def("launches", &jit::Launches,
        "How many launches were enqueued or recorded; a graph that is replayed adds none.");
  m.def("cuda_devices", &CudaDevices,
        "One dict per GPU: name, ordinal, major, minor, num_sms, memory_gbs. Empty when libcuda is "
        "absent or reports no device; any other failure of the driver raises Error.");
}

}  // namespace dg::ffi
