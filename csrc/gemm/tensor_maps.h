// The tensor maps of one launch, as plain numbers: which box of which array TMA moves per
// instruction. csrc/ffi encodes them with the driver.
#pragma once

#include <cstdint>

#include "csrc/gemm/config.h"

namespace dg {

// A row-major matrix in global memory and the box of it that one TMA instruction moves.
struct TensorMapSpec {
  int element_bytes;  // 1: fp8, 2: bf16, 4: float32
  int64_t columns;    // contiguous dimension
  int64_t rows;
  int64_t pitch_bytes;  // from one row to the next
  int box_columns;
  int box_rows;
  int swizzle_bytes;  // 128, 64, 32, or 0 for none
};

struct TensorMapSpecs {
  TensorMapSpec a;    // [m, k] fp8
  TensorMapSpec b;    // [n, k] fp8
  TensorMapSpec sfa;  // [ceil(k/128), padded_m] float32: SFA as it lies in memory, m-contiguous
  TensorMapSpec d;    // [m, n] bf16
};

// The maps of a launch with m >= 1 rows, of which SFA holds padded_m (a multiple of 4: TMA strides
// are multiples of 16 bytes).
TensorMapSpecs MakeTensorMapSpecs(const GemmProblem& problem, const GemmConfig& config,
                                  int64_t padded_m);

}  // namespace dg
