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
  // [m, k] fp8, by whole tiles or a CTA's share of one, and by parts of tiles that do not have all
  // their rows. Kernels that know no parts have one of the two, whose box all tiles are.
  TensorMapSpec a[2];
  int num_a;
  TensorMapSpec b;    // [num_groups * n, k] fp8
  TensorMapSpec sfa;  // [1, ceil(k/128) * sfa_pitch] float32
  TensorMapSpec d;    // [m, n] bf16
  int part_rows;      // of KernelParams
};

// Whether tiles may have fewer rows than others and are copied by parts then (never where A is
// shared). Kernels are made for either case, because a tensor map more and the choice between them
// is up to 3 % of decode.
bool HasParts(const GemmProblem& problem, const GemmConfig& config);

// The maps of a launch with m >= 1 rows. `has_parts`: the kernel is made for parts, as it must be
// where HasParts. `sfa_pitch`: elements from one k-block of SFA to the next.
TensorMapSpecs MakeTensorMapSpecs(const GemmProblem& problem, const GemmConfig& config,
                                  bool has_parts, int64_t sfa_pitch);

}  // namespace dg
