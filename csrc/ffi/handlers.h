// XLA FFI handlers of the GEMM: instantiate plans and compiles, initialize loads on a device,
// execute encodes tensor maps and launches. module.cc exports them to Python.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace dg::ffi {

// The custom-call target's name, and its state's; versioned, so that exported programs keep the
// meaning they were exported with.
inline constexpr char kGemmTarget[] = "jax_deepgemm.gemm_fp8_fp8_bf16_nt.v2";
inline constexpr char kGemmStateType[] = "jax_deepgemm.GemmState";

XLA_FFI_Handler* GemmInstantiate();
XLA_FFI_Handler* GemmInitialize();
XLA_FFI_Handler* GemmExecute();

// What XLA needs to know about the state that instantiate makes.
XLA_FFI_TypeId* GemmStateTypeId();
XLA_FFI_TypeInfo* GemmStateTypeInfo();

}  // namespace dg::ffi
