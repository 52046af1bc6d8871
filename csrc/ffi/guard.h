// What handlers turn their exceptions into.
#pragma once

#include <exception>
#include <string>

#include "csrc/jit/error.h"
#include "xla/ffi/api/ffi.h"

namespace dg::ffi {

inline ::xla::ffi::Error ToStatus(const std::string& function, const std::exception& exception) {
  using XlaCode = ::xla::ffi::ErrorCode;
  XlaCode code = XlaCode::kInternal;
  if (const auto* error = dynamic_cast<const Error*>(&exception)) {
    switch (error->code()) {
      case ErrorCode::kInvalidArgument:
        code = XlaCode::kInvalidArgument;
        break;
      case ErrorCode::kUnimplemented:
        code = XlaCode::kUnimplemented;
        break;
      case ErrorCode::kUnavailable:
        code = XlaCode::kUnavailable;
        break;
      case ErrorCode::kInternal:
        break;
    }
  }
  return ::xla::ffi::Error(code, function + ": " + exception.what());
}

// Runs `body`: no exception leaves a handler. `function` returns the name that errors begin with;
// it is called when one has occurred.
template <typename Function, typename Body>
::xla::ffi::Error Guarded(const Function& function, const Body& body) {
  try {
    body();
    return ::xla::ffi::Error::Success();
  } catch (const std::exception& exception) {
    return ToStatus(function(), exception);
  }
}

}  // namespace dg::ffi
