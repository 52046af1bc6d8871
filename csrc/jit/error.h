// The exception that the host side of jax_deepgemm throws.
//
// csrc/jit and csrc/ffi throw it, and csrc/ffi turns it into an XLA status or a Python exception;
// no exception crosses the FFI boundary. csrc/gemm and csrc/quantize throw none: they say why.
#pragma once

#include <stdexcept>
#include <string>

namespace dg {

// The kinds of failure that callers treat differently; csrc/ffi maps them to XLA's status codes.
enum class ErrorCode {
  kInvalidArgument,  // The caller's request makes no sense.
  kUnimplemented,    // The request makes sense, but this hardware or version cannot serve it.
  kUnavailable,      // A library, driver, compiler or device is missing or too old.
  kInternal,         // A call that should have worked has failed.
};

// A failure whose message names the call, the code's name, the path and the log where they exist.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

  // The kind of failure.
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace dg
