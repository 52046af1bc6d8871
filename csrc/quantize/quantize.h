// What a quantiser's launch computes, which kernel does it and with how many blocks: plain numbers,
// no CUDA call. csrc/ffi compiles and launches it.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/jit/source.h"
#include "csrc/kernels/quantize_params.h"

namespace dg {

// One call; jax_deepgemm/quantize_call.py's QuantizeProblem.
struct QuantizeProblem {
  QuantizeOp op;
  FloatType input;
  Fp8Type output;
  bool power_of_two;
  int64_t batch;      // matrices, one below the other
  int64_t rows;       // of a matrix
  int64_t k;          // columns of the values; x has twice as many for SwiGLU
  int64_t num_sizes;  // sizes per matrix; 0: all rows count
};

// Why no kernel computes it, "" if one does.
std::string WhyUnsupported(const QuantizeProblem& problem);

// Tiles of 128 columns side by side in a CTA's tile. Fewer where the CTAs would not fill the GPU.
int TileGroups(const QuantizeProblem& problem);

// Tiles below each other in a matrix, and tiles side by side.
int64_t RowTiles(const QuantizeProblem& problem);
int64_t ColumnTiles(const QuantizeProblem& problem);

// The CTAs of a launch on a GPU with num_sms multiprocessors: one for each tile; but with sizes no
// more than are there at twice, which share the tiles whose rows count.
int64_t GridSize(const QuantizeProblem& problem, int64_t num_sms);

// The kernel's name, also its symbol, for example
// "dg_quantize_per_token_bf16_e4m3fn_g4". One kernel serves many sizes.
std::string KernelName(const QuantizeProblem& problem);

// What the JIT compiles.
jit::KernelSource QuantizeSource(const QuantizeProblem& problem);

}  // namespace dg
