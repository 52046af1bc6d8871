#include "csrc/quantize/quantize.h"

#include <algorithm>
#include <array>
#include <limits>
#include <sstream>
#include <string>

#include "csrc/gemm/config.h"
#include "csrc/gemm/kernel_source.h"

namespace dg {
namespace {

constexpr std::array<const char*, 5> kOpNames = {"quantize_per_token", "quantize_per_block",
                                                 "quantize_per_token_transposed",
                                                 "quantize_per_token_both", "silu_mul_quantize"};
constexpr std::array<const char*, 3> kInputNames = {"bf16", "f16", "f32"};
constexpr std::array<const char*, 2> kOutputNames = {"e4m3fn", "e5m2"};

// An H100 has 132 SMs; with two CTAs for each, half a tile's width costs nothing.
constexpr int64_t kFullGrid = 264;

// CTAs that share tiles, in multiples of those that a GPU holds at once. All of them start, however
// few rows count, so there are few; with more than one, a CTA that is late holds up less.
constexpr int64_t kWaves = 2;

template <typename Enum>
constexpr int Index(Enum value) {
  return static_cast<int>(value);
}

// The widest tile: SwiGLU reads two inputs per value and keeps as many bytes in flight with half.
int WidestTileGroups(QuantizeOp op) {
  return op == QuantizeOp::kPerToken ? 4 : op == QuantizeOp::kSiluMul ? 2 : 1;
}

// 16-byte loads of every row and 8-byte stores.
bool HasVectorColumns(const QuantizeProblem& problem) { return problem.k % 8 == 0; }

// 16-byte stores of every row of the transposed copy. Others do not care.
bool HasVectorRows(const QuantizeProblem& problem) {
  return !writes_transposed(problem.op) || problem.rows % 16 == 0;
}

// CTAs that an SM must have registers for: three keep twice the bytes in flight that the memory
// wants, two where more registers save spilling. SwiGLU computes for about as long as it loads, and
// with four one computes while others load.
int MinBlocks(const QuantizeProblem& problem) {
  if (problem.input != FloatType::kBf16 || !HasVectorColumns(problem)) return 2;
  return problem.op == QuantizeOp::kSiluMul ? 4 : writes_transposed(problem.op) ? 2 : 3;
}

}  // namespace

std::string WhyUnsupported(const QuantizeProblem& problem) {
  if (problem.batch < 0 || problem.rows < 0 || problem.k < 0 || problem.num_sizes < 0) {
    return "sizes must not be negative";
  }
  if (problem.num_sizes > 0 && !has_token_tiles(problem.op)) {
    return "only tokens take sizes";
  }
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  // Rows and columns of all matrices, their padding included, and CTAs are counted in 32 bits.
  const auto exceeds = [](int64_t x, int64_t y) { return y != 0 && x > (kLimit - 512) / y; };
  if (problem.num_sizes > kLimit || problem.k > (kLimit - 512) / 2 || problem.rows > kLimit - 512 ||
      exceeds(problem.batch, problem.rows) || exceeds(problem.batch, problem.k) ||
      exceeds(problem.batch * CeilDiv(problem.rows, tile_rows(problem.op)),
              CeilDiv(problem.k, kQuantizeBlock))) {
    return "there are too many rows or columns for 32-bit indices";
  }
  return "";
}

int TileGroups(const QuantizeProblem& problem) {
  const int64_t row_tiles = problem.batch * CeilDiv(problem.rows, tile_rows(problem.op));
  const int64_t k_blocks = CeilDiv(problem.k, kQuantizeBlock);
  int groups = WidestTileGroups(problem.op);
  while (groups > 1 && row_tiles * CeilDiv(k_blocks, groups) < kFullGrid) groups /= 2;
  return groups;
}

int64_t RowTiles(const QuantizeProblem& problem) {
  return CeilDiv(problem.rows, tile_rows(problem.op));
}

int64_t ColumnTiles(const QuantizeProblem& problem) {
  return CeilDiv(problem.k, kQuantizeBlock * TileGroups(problem));
}

int64_t GridSize(const QuantizeProblem& problem, int64_t num_sms) {
  const int64_t tiles = problem.batch * RowTiles(problem) * ColumnTiles(problem);
  return problem.num_sizes == 0 ? tiles : std::min(tiles, kWaves * num_sms * MinBlocks(problem));
}

std::string KernelName(const QuantizeProblem& problem) {
  std::ostringstream name = SourceStream();
  name << "dg_" << kOpNames[Index(problem.op)] << "_" << kInputNames[Index(problem.input)] << "_"
       << kOutputNames[Index(problem.output)] << "_g" << TileGroups(problem)
       << (problem.power_of_two ? "_pow2" : "") << (problem.num_sizes > 0 ? "_sizes" : "")
       << (HasVectorColumns(problem) ? "" : "_oddk") << (HasVectorRows(problem) ? "" : "_oddm");
  return name.str();
}

jit::KernelSource QuantizeSource(const QuantizeProblem& problem) {
  std::ostringstream text = SourceStream();
  const auto constant = [&](const char* name, int value) {
    text << "constexpr int " << name << " = " << value << ";\n";
  };
  text << "namespace dg::config {\n";
  constant("kOp", Index(problem.op));
  constant("kInput", Index(problem.input));
  constant("kOutput", Index(problem.output));
  constant("kPowerOfTwo", problem.power_of_two);
  constant("kHasSizes", problem.num_sizes > 0);
  constant("kTileGroups", TileGroups(problem));
  constant("kVectorColumns", HasVectorColumns(problem));
  constant("kVectorRows", HasVectorRows(problem));
  constant("kMinBlocks", MinBlocks(problem));
  text << "}  // namespace dg::config\n\n"
       << "#define DG_KERNEL_NAME " << KernelName(problem) << "\n"
       << "#include \"quantize.cuh\"\n";

  jit::KernelSource source;
  source.name = source.entry = KernelName(problem);
  source.text = text.str();
  // These alone: a changed GEMM is no reason to compile a quantiser again.
  for (const KernelFile& file : KernelFiles()) {
    if (file.name == "quantize.cuh" || file.name == "quantize_params.h" || file.name == "ptx.cuh") {
      source.headers.push_back({file.name, file.text});
    }
  }
  return source;
}

}  // namespace dg
