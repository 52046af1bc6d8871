// FP8 quantisation in one pass: read x once, find the largest magnitude of every block of 128
// values, write FP8 values and float32 scales.
//
//   amax   = largest finite |x| of the block
//   scale  = max(amax * fl(1 / largest), 2^-126), or the power of two above; 1 if amax < 2^-126
//   values = fp8(x * fl(1 / scale)), NaN where x is not finite
//
// Every step is an IEEE operation, so the bits are those of jax_deepgemm/quantize_reference.py.
// Numbers below 2^-126 count as zeros (.ftz).
//
// A CTA has 256 threads, 16 half-warps, and one tile of x, which it keeps in registers between
// finding amax and scaling. A half-warp reads 128 values of a row at once, 8 a lane: 256 bytes of
// bf16. All of a thread's loads are issued before the first is used (`wait_for_loads`): with 32 KB
// of bf16 a CTA and 2 or 3 CTAs an SM, more bytes are in flight than the memory's latency times its
// rate (about 18 KB an SM).
//
//   op            tile            128-value pieces of half-warp h     amax is taken over
//   per token     32 x 128 * g    piece 16 i + h of the tile          its 16 lanes
//   SwiGLU        32 x 128 * g    the same, of gate and of up         its 16 lanes
//   per block     128 x 128       rows h, 16 + h, 32 + h, ...         the CTA
//   transposed    128 x 128       rows 8 h to 8 h + 7                 columns of the CTA
//   both          128 x 128       rows 8 h to 8 h + 7                 its 16 lanes, then columns
//
// Scales of tokens lie m-contiguous, as GEMMs read them. The 32 rows of a tile are 128 bytes there:
// the CTA collects its scales in shared memory and writes whole sectors. The transposed copy goes
// through shared memory, too: a lane packs 8 rows of a column into 8 bytes.
//
// Values that are not finite are rare. A maximum that keeps NaN shows whether a block has any; only
// then the code runs that looks at each value.
//
// Rows that do not count (sizes) are neither read nor written, and tiles without any that do cost
// nothing: CTAs, no more than a few waves of them, share the others.
//
// config:: holds constants: kOp, kInput, kOutput, kPowerOfTwo, kHasSizes, kTileGroups (g above),
// kVectorColumns (k is a multiple of 8: 16-byte loads, 8-byte stores), kVectorRows (rows are a
// multiple of 16: 16-byte stores of the transposed copy).
#pragma once

#include "ptx.cuh"
#include "quantize_params.h"

namespace dg {

// --- Constants -----------------------------------------------------------------------------------

constexpr QuantizeOp kOp = static_cast<QuantizeOp>(config::kOp);
constexpr FloatType kInput = static_cast<FloatType>(config::kInput);
constexpr Fp8Type kOutput = static_cast<Fp8Type>(config::kOutput);

constexpr int kLanes = 16;   // of a half-warp
constexpr int kPerLane = 8;  // values
constexpr int kHalfWarps = kQuantizeThreads / kLanes;
constexpr int kTileRows = tile_rows(kOp);
constexpr int kScalesPerTile = kTileRows * config::kTileGroups;
constexpr int kPieces = kScalesPerTile / kHalfWarps;  // of a half-warp: 128 values each
constexpr int kInputBytes = kInput == FloatType::kF32 ? 4 : 2;
constexpr int kLoads = kPerLane * kInputBytes / 16;  // 16-byte loads of a lane and piece

static_assert(kLanes * kPerLane == kQuantizeBlock, "a half-warp reads one block of a row");
static_assert(kHalfWarps % config::kTileGroups == 0, "a half-warp's pieces have the same columns");
static_assert(kScalesPerTile % kHalfWarps == 0, "half-warps share a tile evenly");
static_assert(has_token_tiles(kOp) || config::kTileGroups == 1, "these tiles are 128 wide");

// Rows from one piece of a half-warp to its next: it has 8 rows that follow each other where lanes
// pack rows, or else every 16th, or every fourth where four half-warps share a row.
constexpr bool kConsecutiveRows = writes_transposed(kOp);
constexpr int kRowStep = kConsecutiveRows ? 1 : kHalfWarps / config::kTileGroups;
static_assert(!kConsecutiveRows || kPieces == 8, "a lane packs 8 rows of a column into 8 bytes");

constexpr uint32_t kInfinity = 0x7f800000;
constexpr uint32_t kSmallestNormal = 0x00800000;
constexpr uint32_t kLargestFloat = 0x7f7fffff;
constexpr uint32_t kNan = 0x7fffffff;

// The largest FP8 number is 1.75 * 2^kLargestExponent.
constexpr int kLargestExponent = kOutput == Fp8Type::kE4m3 ? 8 : 15;
constexpr float kInverseLargest =
    static_cast<float>(1.0 / (1.75 * (1 << kLargestExponent)));  // rounded once, as NumPy does

// 2^-f = 1 - c1 f + c2 f^2 - c3 f^3 + c4 f^4 for 0 <= f <= 1, to 2^-18; EXP2_POLYNOMIAL in
// quantize_reference.py.
constexpr float kExp2[] = {1.0f, 0xb16c1cp-24f, 0xf526c3p-26f, 0xd99c69p-28f, 0x6f0c76p-30f};

// --- Instructions --------------------------------------------------------------------------------

// 16 bytes, or zeros if not `valid`; without a branch, so that loads follow each other closely. x
// is read once: it need not stay in L1.
__device__ __forceinline__ uint4 ld_global_v4(const void* address, bool valid) {
  uint4 v;
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
      "  mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "  @p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(address), "r"(static_cast<int>(valid))
      : "memory");
  return v;
}

__device__ __forceinline__ void st_global_v2(void* address, uint32_t x, uint32_t y, bool valid) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %3, 0; @p st.global.v2.u32 [%0], {%1, %2}; }" ::"l"(address),
      "r"(x), "r"(y), "r"(static_cast<int>(valid))
      : "memory");
}

__device__ __forceinline__ float mul_ftz(float x, float y) {
  float product;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(x), "f"(y));
  return product;
}

// x * y + z in one instruction. Of the same in C++ the compiler makes a shift, a mask and a sum.
__device__ __forceinline__ uint32_t mad_lo(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t sum;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
  return sum;
}

// The product, but 0 if it is below and 1 if it is above them; 0 for NaN.
__device__ __forceinline__ float mul_sat(float x, float y) {
  float product;
  asm("mul.rn.ftz.sat.f32 %0, %1, %2;" : "=f"(product) : "f"(x), "f"(y));
  return product;
}

// The larger one, NaN if any is.
__device__ __forceinline__ float max_nan(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}

// Two values to FP8, `low` in the lower byte; beyond the largest number it stays the largest.
__device__ __forceinline__ uint32_t cvt_fp8x2(float low, float high) {
  unsigned short pair;
  if (kOutput == Fp8Type::kE4m3) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// --- Numbers -------------------------------------------------------------------------------------

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ bool is_finite(float x) { return (as_bits(x) & 0x7fffffff) < kInfinity; }

// 1 / x to the nearest, for x from 2^-126 to 2^125: the approximation and a Newton step, which is
// what rcp.rn does in this range, less its branch for the rest.
__device__ __forceinline__ float reciprocal_of(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return __fmaf_rn(r, __fmaf_rn(-x, r, 1.0f), r);
}

// Four scaled values in memory order; NaN becomes 0x7f.
__device__ __forceinline__ uint32_t pack_fp8(float v0, float v1, float v2, float v3) {
  return cvt_fp8x2(v0, v1) | cvt_fp8x2(v2, v3) << 16;
}

// The scale of a block, from the bits of its largest magnitude.
__device__ __forceinline__ float scale_of(uint32_t amax) {
  float scale;
  if (config::kPowerOfTwo) {
    // Adding 0.25 (less one unit) to the fraction carries where it exceeds 0.75.
    const int exponent = static_cast<int>((amax + 0x1fffff) >> 23) - kLargestExponent;
    scale = as_float(static_cast<uint32_t>(max(exponent, 1)) << 23);
  } else {
    scale = fmaxf(__fmul_rn(as_float(amax), kInverseLargest), as_float(kSmallestNormal));
  }
  return amax < kSmallestNormal ? 1.0f : scale;
}

// exp(-x) for x >= 0: x * log2(e) = n + f, with 16 bits of fraction, and 2^-f by a polynomial, to
// the bits of `exp_negative` in quantize_reference.py, whose integers are here the fractions of
// float32 numbers that stay within one power of two: a rounding of the float32 unit is a rounding
// of the integer, and each step of the polynomial one instruction.
__device__ __forceinline__ float exp_negative(float x) {
  const float y = mul_sat(x, 0x1.715476p-7f);            // (n + f) / 128, at most 1
  const float sum = __fmaf_rn(y, 2.0f, 2.0f);            // in [2, 4], in units of 2^-22: 2^-16 of f
  const float whole = as_float(as_bits(sum) & ~0xffff);  // 2 + n / 64
  const float f = __fadd_rn(sum, -whole);                // f / 64: the powers of 64 below; exact
  float power = __fmaf_rz(-f, kExp2[4] * 0x1p25f, kExp2[3] * 0x1p19f);
  power = __fmaf_rz(-f, power, kExp2[2] * 0x1p13f);
  power = __fmaf_rz(-f, power, kExp2[1] * 0x1p7f);
  power = __fmaf_rz(-f, power, kExp2[0] * 0x1p1f);  // 2 * 2^-f
  // Twice the result, lest the exponent of 2^-128 be negative: it is zero for whole = 4, and what
  // is less than 2^-126 becomes zero with the factor.
  return mul_ftz(as_float(mad_lo(as_bits(whole), -(1u << 7), as_bits(power))), 0.5f);
}

// silu(gate) * up; infinite where that overflows.
__device__ __forceinline__ float silu_mul(float gate, float up) {
  const float e = exp_negative(fabsf(gate));
  const float numerator = fmaxf(gate, mul_ftz(gate, e));  // the first unless gate is negative
  return mul_ftz(mul_ftz(numerator, reciprocal_of(1.0f + e)), up);
}

// --- A lane's 8 values of a piece ----------------------------------------------------------------

struct Raw {
  uint4 words[kLoads];
  uint32_t zero;  // of bf16; see wait_for_loads

  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& v = words[i / 4];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }

  // Makes value i NaN.
  __device__ __forceinline__ void set_nan(int i) {
    const int index = kInputBytes == 4 ? i : i / 2;
    uint4& v = words[index / 4];
    uint32_t& word = index % 4 == 0 ? v.x : index % 4 == 1 ? v.y : index % 4 == 2 ? v.z : v.w;
    word = kInputBytes == 4 ? kNan
           : i % 2 == 0     ? (word & 0xffff0000) | 0x00007fff
                            : (word & 0x0000ffff) | 0x7fff0000;
  }

  // Value i; float32 numbers below 2^-126 may still be there.
  __device__ __forceinline__ float get(int i) const {
    if (kInput == FloatType::kF32) return as_float(word(i));
    const uint32_t pair = word(i / 2);
    if (kInput == FloatType::kBf16) {  // one instruction, `zero` included
      return as_float(i % 2 == 0 ? mad_lo(pair, 1 << 16, zero) : (pair & 0xffff0000) ^ zero);
    }
    const auto half = static_cast<unsigned short>(i % 2 == 0 ? pair : pair >> 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
  }
};

// 8 values from `x` on, of which `count` are there, or none if not `valid`; the others are zeros.
__device__ __forceinline__ Raw load(const char* x, int count, bool valid) {
  Raw raw = {};
  if (config::kVectorColumns) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) raw.words[i] = ld_global_v4(x + 16 * i, valid);
    return raw;
  }
  uint32_t words[4 * kLoads] = {};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (!valid || i >= count) continue;
    if (kInputBytes == 4) {
      words[i] = reinterpret_cast<const uint32_t*>(x)[i];
    } else {
      const uint32_t half = reinterpret_cast<const unsigned short*>(x)[i];
      words[i / 2] |= i % 2 == 0 ? half : half << 16;
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    raw.words[i] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
  }
  return raw;
}

// Writes the first `count` of 8 FP8 values, or none if not `valid`.
__device__ __forceinline__ void store(char* out, uint32_t low, uint32_t high, int count,
                                      bool valid) {
  if (config::kVectorColumns) {
    st_global_v2(out, low, high, valid);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (valid && i < count) out[i] = static_cast<char>((i < 4 ? low : high) >> (8 * (i % 4)));
  }
}

// Keeps the compiler from using the first value before the last load is issued, which it prefers
// because it saves registers: all values depend on the outcome of a barrier, which is zero. What
// makes float32 of bf16 takes it in for nothing.
__device__ __forceinline__ void wait_for_loads(const QuantizeParams& params, Raw (&raw)[kPieces],
                                               Raw (&up)[kPieces]) {
  const auto zero = static_cast<uint32_t>(__syncthreads_or(params.k < 0));
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    raw[i].zero = up[i].zero = zero;
    if (kInput == FloatType::kBf16) continue;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      uint4& x = raw[i].words[j];
      x = {x.x ^ zero, x.y ^ zero, x.z ^ zero, x.w ^ zero};
      if (kOp != QuantizeOp::kSiluMul) continue;
      uint4& y = up[i].words[j];
      y = {y.x ^ zero, y.y ^ zero, y.z ^ zero, y.w ^ zero};
    }
  }
}

// The values of a piece as float32, SwiGLU applied.
__device__ __forceinline__ void get_values(const Raw& raw, const Raw& up,
                                           float (&values)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    values[j] = kOp == QuantizeOp::kSiluMul ? silu_mul(raw.get(j), up.get(j)) : raw.get(j);
  }
}

// Makes NaN of infinite values, but the largest float32 of products of finite ones.
__device__ __forceinline__ void replace_infinite(const Raw& raw, const Raw& up,
                                                 float (&values)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (is_finite(values[j])) continue;
    const bool overflow =
        kOp == QuantizeOp::kSiluMul && is_finite(raw.get(j)) && is_finite(up.get(j));
    values[j] = as_float(overflow ? (as_bits(values[j]) & 0x80000000) | kLargestFloat : kNan);
  }
}

// The bits of the larger magnitude, at least kInfinity if one is not finite; or, if `kIgnoreNan`,
// of those that are not NaN.
template <bool kIgnoreNan>
__device__ __forceinline__ uint32_t larger_magnitude(uint32_t amax, float x) {
  const float magnitude = fabsf(x);
  return as_bits(kIgnoreNan ? fmaxf(as_float(amax), magnitude)
                            : max_nan(as_float(amax), magnitude));
}

template <bool kIgnoreNan>
__device__ __forceinline__ uint32_t max_magnitude(const float (&values)[kPerLane]) {
  uint32_t amax = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) amax = larger_magnitude<kIgnoreNan>(amax, values[j]);
  return amax;
}

// Makes NaN of infinite values.
__device__ __forceinline__ void set_nan_where_infinite(Raw (&raw)[kPieces]) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (!is_finite(raw[i].get(j))) raw[i].set_nan(j);
    }
  }
}

__device__ __forceinline__ uint32_t max_of_half_warp(uint32_t value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffff, value, distance));
  }
  return value;
}

// --- Tiles ---------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// A matrix and how many of its rows count.
struct Matrix {
  int index;
  int rows;
};

// The tiles of a CTA, index after index. Without sizes it has one, that of its block index.
// Otherwise only tiles with rows that count have an index, a CTA takes every gridDim.x-th, and each
// warp looks them up, 32 matrices (a page) at a time, one for each lane: many groups of which few
// have rows cost a few loads and scans, not a CTA for each tile.
class TileIndices {
 public:
  __device__ __forceinline__ explicit TileIndices(const QuantizeParams& params) : params_(params) {
    if (config::kHasSizes) read_page();
  }

  // The matrix that has the tile; `tile` becomes the tile's index in it. Indices must not decrease.
  // False if there is no such tile. Whole warps.
  __device__ __forceinline__ bool find(uint32_t& tile, Matrix& matrix) {
    if constexpr (config::kHasSizes) {
      uint32_t found;
      while ((found = __ballot_sync(0xffffffff, tile < end_)) == 0) {
        before_ = __shfl_sync(0xffffffff, end_, 31);
        page_ += 32;
        if (page_ >= params_.batch) return false;
        read_page();
      }
      const int lane = __ffs(static_cast<int>(found)) - 1;
      matrix = {page_ + lane, __shfl_sync(0xffffffff, rows_, lane)};
      tile -= lane == 0 ? before_ : __shfl_sync(0xffffffff, end_, lane - 1);
    } else {
      const uint32_t tiles = params_.row_tiles * params_.column_tiles;
      matrix = {static_cast<int>(tile / tiles), params_.rows};
      tile %= tiles;
    }
    return true;
  }

 private:
  // Sets rows_ and end_.
  __device__ __forceinline__ void read_page() {
    const int lane = laneid();
    const int matrices = min(32, params_.batch - page_);
    const int* sizes = params_.sizes + static_cast<long long>(page_) * params_.num_sizes;
    rows_ = 0;
    if (params_.num_sizes == 1) {
      if (lane < matrices) rows_ = min(max(0, sizes[lane]), params_.rows);
    } else {
#pragma unroll 1
      for (int i = 0; i < matrices; ++i, sizes += params_.num_sizes) {
        const int rows = sum(sizes);
        if (lane == i) rows_ = rows;
      }
    }
    end_ = ceil_div(rows_, kTileRows) * params_.column_tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t below = __shfl_up_sync(0xffffffff, end_, distance);
      if (lane >= distance) end_ += below;
    }
    end_ += before_;
  }

  // The sum of a matrix' sizes, at most its rows; negative ones count as 0. Whole warps.
  __device__ __forceinline__ int sum(const int* sizes) const {
    const auto most = static_cast<uint32_t>(params_.rows);
    uint32_t sum = 0;  // two numbers below 2^31 do not overflow it
#pragma unroll 1
    for (int i = laneid(); i < params_.num_sizes; i += 32) {
      sum = min(sum + static_cast<uint32_t>(max(0, sizes[i])), most);
    }
    const uint64_t low = __reduce_add_sync(0xffffffff, sum & 0xffff);
    const uint64_t high = __reduce_add_sync(0xffffffff, sum >> 16);
    return static_cast<int>(min((high << 16) + low, static_cast<uint64_t>(most)));
  }

  const QuantizeParams& params_;
  int page_ = 0;         // the first of its matrices
  uint32_t before_ = 0;  // tiles of the matrices before the page
  // Of the lane's matrix: rows that count; tiles of all matrices up to this one.
  int rows_ = 0;
  uint32_t end_ = 0;
};

// Which part of which matrix a CTA has, and what of it a thread has.
struct Tile {
  int matrix;
  int row;     // of the matrix
  int column;  // of the values
  int rows;    // that count, from `row` on; may be more than the tile's
  // Of the thread: lane and half-warp; the tile's row of its first piece, the matrix' column of all
  // of them; how many of its pieces are there; and of their 8 columns, how many.
  int lane;
  int half_warp;
  int first_row;
  int first_column;
  int pieces;
  int columns;

  // Tile `index` of a matrix.
  __device__ __forceinline__ Tile(const QuantizeParams& params, const Matrix& in, uint32_t index) {
    const uint32_t row_tile = index / static_cast<uint32_t>(params.column_tiles);
    const uint32_t column_tile = index - row_tile * params.column_tiles;
    matrix = in.index;
    row = static_cast<int>(row_tile * kTileRows);
    column = static_cast<int>(column_tile * config::kTileGroups * kQuantizeBlock);
    rows = in.rows - row;
    lane = static_cast<int>(threadIdx.x % kLanes);
    half_warp = static_cast<int>(threadIdx.x / kLanes);
    first_row = kConsecutiveRows ? half_warp * kPieces
                                 : static_cast<int>(threadIdx.x / (kLanes * config::kTileGroups));
    first_column = column + group() * kQuantizeBlock + lane * kPerLane;
    columns = params.k - first_column;
    pieces = columns > 0 && rows > first_row ? ceil_div(rows - first_row, kRowStep) : 0;
  }

  // The 128 columns of the tile that the thread's pieces have.
  __device__ __forceinline__ int group() const {
    return static_cast<int>(threadIdx.x / kLanes % config::kTileGroups);
  }

  // The index of a row of the tile among the rows of all matrices.
  __device__ __forceinline__ long long global_row(const QuantizeParams& params,
                                                  int tile_row) const {
    return static_cast<long long>(matrix) * params.rows + row + tile_row;
  }
};

// Where a thread's pieces go.
class Output {
 public:
  __device__ __forceinline__ Output(const QuantizeParams& params, const Tile& tile)
      : first_(static_cast<char*>(params.values) +
               tile.global_row(params, tile.first_row) * params.k + tile.first_column),
        step_(static_cast<long long>(kRowStep) * params.k),
        pieces_(tile.pieces),
        columns_(tile.columns) {}

  // Scales piece i and writes it.
  __device__ __forceinline__ void write(int i, const float (&values)[kPerLane],
                                        float reciprocal) const {
    uint32_t words[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float* v = values + 4 * j;
      words[j] = pack_fp8(mul_ftz(v[0], reciprocal), mul_ftz(v[1], reciprocal),
                          mul_ftz(v[2], reciprocal), mul_ftz(v[3], reciprocal));
    }
    store(first_ + i * step_, words[0], words[1], columns_, i < pieces_);
  }

 private:
  char* first_;
  long long step_;  // from one piece to the next
  int pieces_;
  int columns_;
};

// --- Scales of tokens ----------------------------------------------------------------------------

__device__ __forceinline__ void quantize_tokens(const QuantizeParams& params, const Tile& tile,
                                                Raw (&raw)[kPieces], Raw (&up)[kPieces]) {
  __shared__ float scales[config::kTileGroups][kTileRows];
  const Output output(params, tile);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    float values[kPerLane];
    get_values(raw[i], up[i], values);
    uint32_t amax = max_of_half_warp(max_magnitude<false>(values));
    if (__any_sync(0xffffffff, amax >= kInfinity)) {
      replace_infinite(raw[i], up[i], values);
      amax = max_of_half_warp(max_magnitude<true>(values));
    }
    const float scale = scale_of(amax);
    output.write(i, values, reciprocal_of(scale));
    if (tile.lane == 0) scales[tile.group()][tile.first_row + i * kRowStep] = scale;
  }
  __syncthreads();
  // A scale a thread, to [k-blocks][rows of all matrices].
  static_assert(kScalesPerTile <= kQuantizeThreads, "a thread writes one scale at most");
  if (threadIdx.x >= kScalesPerTile) return;
  const int tile_row = static_cast<int>(threadIdx.x % kTileRows);
  const int group = static_cast<int>(threadIdx.x / kTileRows);
  const int k_block = tile.column / kQuantizeBlock + group;
  if (tile_row < tile.rows && k_block * kQuantizeBlock < params.k) {
    params.scales[static_cast<long long>(k_block) * params.scales_pitch +
                  tile.global_row(params, tile_row)] = scales[group][tile_row];
  }
}

// --- A scale of a block --------------------------------------------------------------------------

// The largest magnitude in the tile.
template <bool kIgnoreNan>
__device__ __forceinline__ uint32_t block_magnitude(const Raw (&raw)[kPieces],
                                                    uint32_t (&warp_amax)[kQuantizeThreads / 32]) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) amax = larger_magnitude<kIgnoreNan>(amax, raw[i].get(j));
  }
  amax = __reduce_max_sync(0xffffffff, amax);
  if (laneid() == 0) warp_amax[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kQuantizeThreads / 32; ++warp) amax = max(amax, warp_amax[warp]);
  return amax;
}

__device__ __forceinline__ void quantize_block(const QuantizeParams& params, const Tile& tile,
                                               Raw (&raw)[kPieces]) {
  __shared__ uint32_t warp_amax[2][kQuantizeThreads / 32];
  uint32_t amax = block_magnitude<false>(raw, warp_amax[0]);
  if (amax >= kInfinity) {
    set_nan_where_infinite(raw);
    amax = block_magnitude<true>(raw, warp_amax[1]);
  }
  const float scale = scale_of(amax);
  if (threadIdx.x == 0) {
    const long long row_block =
        static_cast<long long>(tile.matrix) * params.row_tiles + tile.row / kQuantizeBlock;
    params.scales[row_block * params.column_tiles + tile.column / kQuantizeBlock] = scale;
  }
  const float reciprocal = reciprocal_of(scale);
  const Output output(params, tile);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    float values[kPerLane];
    get_values(raw[i], raw[i], values);
    output.write(i, values, reciprocal);
  }
}

// --- Scales of columns, and the transposed copy --------------------------------------------------

struct alignas(16) TransposedSmem {
  uint32_t amax[kHalfWarps][kQuantizeBlock];  // of a half-warp's 8 rows
  float reciprocals[kQuantizeBlock];
  char values[kQuantizeBlock * kQuantizeBlock];  // [column][row], chunks of 16 bytes swizzled

  // Where chunk `chunk` (16 rows) of a column lies. Lanes write columns 8 apart: the swizzle
  // spreads them over the banks.
  __device__ __forceinline__ char* at(int column, int chunk) {
    return values + column * kQuantizeBlock + 16 * (chunk ^ (column / kPerLane % 8));
  }
};

// The largest magnitudes of the thread's 8 columns, to shared memory; true if all are finite.
template <bool kIgnoreNan>
__device__ __forceinline__ bool column_magnitudes(const Tile& tile, const Raw (&raw)[kPieces],
                                                  TransposedSmem& smem) {
  uint32_t amax[kPerLane] = {};
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      amax[j] = larger_magnitude<kIgnoreNan>(amax[j], raw[i].get(j));
    largest = max(largest, amax[j]);
  }
#pragma unroll
  for (int j = 0; j < kPerLane; j += 4) {
    *reinterpret_cast<uint4*>(&smem.amax[tile.half_warp][tile.lane * kPerLane + j]) = {
        amax[j], amax[j + 1], amax[j + 2], amax[j + 3]};
  }
  return largest < kInfinity;
}

// Scales the columns into the transposed tile.
__device__ __forceinline__ void finish_columns(const QuantizeParams& params, const Tile& tile,
                                               const Raw (&raw)[kPieces], TransposedSmem& smem) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kQuantizeBlock) {
    uint32_t amax = 0;
#pragma unroll
    for (int half_warp = 0; half_warp < kHalfWarps; ++half_warp) {
      amax = max(amax, smem.amax[half_warp][thread]);
    }
    const float scale = scale_of(amax);
    smem.reciprocals[thread] = reciprocal_of(scale);
    const int column = tile.column + thread;
    if (column < params.k) {
      params.scales_t[static_cast<long long>(tile.row / kQuantizeBlock) * params.scales_t_pitch +
                      static_cast<long long>(tile.matrix) * params.k + column] = scale;
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int column = tile.lane * kPerLane + j;
    const float reciprocal = smem.reciprocals[column];
    float v[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) v[i] = mul_ftz(raw[i].get(j), reciprocal);
    const uint2 words = {pack_fp8(v[0], v[1], v[2], v[3]), pack_fp8(v[4], v[5], v[6], v[7])};
    *reinterpret_cast<uint2*>(smem.at(column, tile.half_warp / 2) + 8 * (tile.half_warp % 2)) =
        words;
  }
}

// Writes the tile's columns as rows, 16 bytes a lane, 128 bytes for each 8 lanes.
__device__ __forceinline__ void store_transposed(const QuantizeParams& params, const Tile& tile,
                                                 TransposedSmem& smem) {
  constexpr int kChunks = kQuantizeBlock / 16;
#pragma unroll
  for (int i = 0; i < kQuantizeBlock * kChunks / kQuantizeThreads; ++i) {
    const int index = i * kQuantizeThreads + static_cast<int>(threadIdx.x);
    const int column = index / kChunks, chunk = index % kChunks;
    const int count = tile.rows - 16 * chunk;
    if (tile.column + column >= params.k || count <= 0) continue;
    const uint4 words = *reinterpret_cast<const uint4*>(smem.at(column, chunk));
    char* out =
        static_cast<char*>(params.values_t) +
        (static_cast<long long>(tile.matrix) * params.k + tile.column + column) * params.rows +
        tile.row + 16 * chunk;
    if (config::kVectorRows) {
      *reinterpret_cast<uint4*>(out) = words;
      continue;
    }
#pragma unroll
    for (int byte = 0; byte < 16; ++byte) {
      const uint32_t word = byte < 4 ? words.x : byte < 8 ? words.y : byte < 12 ? words.z : words.w;
      if (byte < count) out[byte] = static_cast<char>(word >> (8 * (byte % 4)));
    }
  }
}

__device__ __forceinline__ void quantize_transposed(const QuantizeParams& params, const Tile& tile,
                                                    Raw (&raw)[kPieces]) {
  __shared__ TransposedSmem smem;
  if (!__syncthreads_and(column_magnitudes<false>(tile, raw, smem))) {
    set_nan_where_infinite(raw);
    column_magnitudes<true>(tile, raw, smem);
    __syncthreads();
  }
  finish_columns(params, tile, raw, smem);
  __syncthreads();
  store_transposed(params, tile, smem);
}

__device__ __forceinline__ void quantize_tile(const QuantizeParams& params, const Tile& tile) {
  const long long columns = (kOp == QuantizeOp::kSiluMul ? 2LL : 1LL) * params.k;
  const char* x =
      static_cast<const char*>(params.x) +
      (tile.global_row(params, tile.first_row) * columns + tile.first_column) * kInputBytes;
  const long long step = kRowStep * columns * kInputBytes;  // from one piece to the next
  Raw raw[kPieces], up[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const bool valid = i < tile.pieces;
    raw[i] = load(x + i * step, tile.columns, valid);
    if (kOp == QuantizeOp::kSiluMul) {
      up[i] =
          load(x + i * step + static_cast<long long>(params.k) * kInputBytes, tile.columns, valid);
    }
  }
  wait_for_loads(params, raw, up);
  if constexpr (kOp == QuantizeOp::kPerBlock) quantize_block(params, tile, raw);
  if constexpr (writes_rows(kOp) && kOp != QuantizeOp::kPerBlock) {
    quantize_tokens(params, tile, raw, up);
  }
  if constexpr (writes_transposed(kOp)) quantize_transposed(params, tile, raw);
}

}  // namespace dg

extern "C" __global__ void __launch_bounds__(dg::kQuantizeThreads, dg::config::kMinBlocks)
    DG_KERNEL_NAME(const dg::QuantizeParams params) {
  using namespace dg;
  TileIndices indices(params);
  for (uint32_t index = blockIdx.x;; index += gridDim.x) {
    uint32_t tile = index;
    Matrix matrix;
    if (!indices.find(tile, matrix)) return;
    // What a tile leaves in shared memory is read before wait_for_loads, and written behind it.
    quantize_tile(params, Tile(params, matrix, tile));
    if (!config::kHasSizes) return;
  }
}
