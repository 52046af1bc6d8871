// What a quantiser computes, the shape of its tiles, and what a launch passes to the kernel.
//
// Compiled twice, like grouping.h: by the host, which fills QuantizeParams, and by the device
// compiler. Plain C++17 without includes, because the device side has no standard library.
#pragma once

namespace dg {

enum class QuantizeOp : int {
  kPerToken = 0,            // a scale per 1 x 128
  kPerBlock = 1,            // a scale per 128 x 128
  kPerTokenTransposed = 2,  // a scale per 128 x 1, values transposed
  kPerTokenBoth = 3,        // kPerToken and kPerTokenTransposed
  kSiluMul = 4,             // kPerToken of silu(gate) * up
};

enum class FloatType : int { kBf16 = 0, kF16 = 1, kF32 = 2 };

enum class Fp8Type : int { kE4m3 = 0, kE5m2 = 1 };

constexpr int kQuantizeBlock = 128;    // columns, and rows of a square block, that share a scale
constexpr int kQuantizeThreads = 256;  // of a CTA: 16 half-warps
constexpr int kTokenTileRows = 32;     // rows whose scales, side by side in memory, fill 128 bytes

constexpr bool has_token_tiles(QuantizeOp op) {
  return op == QuantizeOp::kPerToken || op == QuantizeOp::kSiluMul;
}
constexpr bool writes_rows(QuantizeOp op) { return op != QuantizeOp::kPerTokenTransposed; }
constexpr bool writes_transposed(QuantizeOp op) {
  return op == QuantizeOp::kPerTokenTransposed || op == QuantizeOp::kPerTokenBoth;
}

// Rows of a CTA's tile; its columns are 128, times kTileGroups where it has token tiles.
constexpr int tile_rows(QuantizeOp op) {
  return has_token_tiles(op) ? kTokenTileRows : kQuantizeBlock;
}

// A launch. Pointers are to global memory.
struct QuantizeParams {
  const void* x;       // [batch, rows, k], SwiGLU: [batch, rows, 2 * k]
  const int* sizes;    // [batch, num_sizes]: their sum is the number of a matrix' rows that count
  void* values;        // fp8 [batch, rows, k]
  float* scales;       // per token: [ceil(k/128), scales_pitch], rows of all matrices contiguous;
                       // per block: [batch, ceil(rows/128), ceil(k/128)]
  void* values_t;      // fp8 [batch, k, rows]
  float* scales_t;     // [ceil(rows/128), scales_t_pitch], columns of all matrices contiguous
  int batch;           // matrices
  int num_sizes;       // 0: all rows count
  int rows;            // of a matrix
  int k;               // columns of the values
  int row_tiles;       // tiles below each other in a matrix
  int column_tiles;    // tiles side by side
  int scales_pitch;    // batch * rows
  int scales_t_pitch;  // batch * k
};

}  // namespace dg
