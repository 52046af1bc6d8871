// The tensor maps of one launch, as plain numbers: which box of which array TMA moves per
// instruction. csrc/ffi encodes them with the driver.
#pragma once

#include <cstdint>

#include "csrc/gemm/config.h"

namespace dg {

// A row-major matrix in global memory and the box of it that one TMA instruction moves.
struct TensorMapSpec {
  int element_bytes;  // 1: fp8, 2: bf16
  int64_t columns;    // contiguous dimension
  int64_t rows;
  int64_t pitch_bytes;  // from one row to the next
  int box_columns;
  int box_rows;
  int swizzle_bytes;  // 128, 64, 32, or 0 for none
};

struct TensorMapSpecs {
  TensorMapSpec a;       // [m, k] fp8, by whole tiles or a CTA's share of one
  TensorMapSpec a_part;  // the same, by parts of tiles that do not have all their rows
  TensorMapSpec b;       // [num_groups * n, k] fp8
  TensorMapSpec d;       // [m, n] bf16
};

// The maps of a launch with m >= 1 rows.
TensorMapSpecs MakeTensorMapSpecs(const GemmProblem& problem, const GemmConfig& config);

}  // namespace dg
