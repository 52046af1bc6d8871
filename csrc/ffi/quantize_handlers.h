// XLA FFI handlers of the quantisers: instantiate compiles, initialize loads on a device, execute
// launches. quantize_bindings.cc exports them to Python.
#pragma once

#include <array>
#include <cstdint>

#include "csrc/quantize/quantize.h"
#include "xla/ffi/api/ffi.h"

namespace dg::ffi {

// The custom-call target's name, and its state's; versioned like the GEMM's.
inline constexpr char kQuantizeTarget[] = "jax_deepgemm.quantize_fp8.v1";
inline constexpr char kQuantizeStateType[] = "jax_deepgemm.QuantizeState";

// A QuantizeProblem as integers, in the order of quantize_call.py's QuantizeProblem.
// ToQuantizeProblem throws Error where they describe none.
using QuantizeFields = std::array<int64_t, 8>;
QuantizeProblem ToQuantizeProblem(const QuantizeFields& fields);

XLA_FFI_Handler* QuantizeInstantiate();
XLA_FFI_Handler* QuantizeInitialize();
XLA_FFI_Handler* QuantizeExecute();

// What XLA needs to know about the state that instantiate makes.
XLA_FFI_TypeId* QuantizeStateTypeId();
XLA_FFI_TypeInfo* QuantizeStateTypeInfo();

}  // namespace dg::ffi
