// Buffers of custom calls, and what must hold of them. The lowering rules see to it; a custom call
// written by hand may not.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "csrc/jit/error.h"
#include "xla/ffi/api/ffi.h"

namespace dg::ffi {

// Throws Error unless the buffer has this type and these sizes.
inline void CheckBuffer(const ::xla::ffi::AnyBuffer& buffer, const char* name,
                        ::xla::ffi::DataType type, std::initializer_list<int64_t> dimensions) {
  if (buffer.element_type() != type) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + " has the wrong element type");
  }
  const auto found = buffer.dimensions();
  if (!std::equal(found.begin(), found.end(), dimensions.begin(), dimensions.end())) {
    const auto list = [](const auto& sizes) {
      std::string text;
      for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
      return "[" + text + "]";
    };
    throw Error(ErrorCode::kInvalidArgument,
                std::string(name) + " must be " + list(dimensions) + ", got " + list(found));
  }
}

// One of the arguments whose number is not the same in every call; throws Error if there is none.
inline ::xla::ffi::AnyBuffer RemainingArgument(const ::xla::ffi::RemainingArgs& arguments,
                                               size_t index) {
  const auto buffer = arguments.get<::xla::ffi::AnyBuffer>(index);
  if (buffer.has_error()) throw Error(ErrorCode::kInvalidArgument, buffer.error().message());
  return *buffer;
}

}  // namespace dg::ffi
