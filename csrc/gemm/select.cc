#include "csrc/gemm/select.h"

#include <algorithm>
#include <cmath>

namespace dg {
namespace {

// The model's constants, fitted to 453 timed (shape, configuration) pairs of dense problems on an
// H100 SXM with a clean L2. On those, what selection picked was 0.6 % slower than the fastest
// configuration by geometric mean and 3 % at worst. The main loop has become faster since, by 2 to
// 5 % where it sets the pace; kInStep was added for grouped problems.
constexpr double kClockGhz = 1.56;             // while multiplying FP8
constexpr double kHbmBytesPerUs = 3.08e6;      // streaming weights
constexpr double kL2BytesPerUs = 7.36e6;       // TMA loads that hit L2, all SMs together
constexpr double kInStep = 1.35;               // more of it for tall tiles in the first two rounds
constexpr double kSmBytesPerCycle = 45;        // what one SM takes in through TMA
constexpr double kMinKBlockCycles = 278;       // full wait, wgmma, empty arrival, in a row
constexpr double kGapCycles = 108;             // between a wgmma and its warpgroup's next one
constexpr double kLaunchUs = 2.55;             // launch, first loads, last store
constexpr double kMulticastUs = 0.32;          // more of it in a cluster
constexpr double kSplitKUs = 0.27;             // more of it, beside the exchange of partial sums
constexpr double kExchangeBytesPerUs = 1.9e4;  // of one CTA's partial sums
constexpr double kEpilogueCycles = 104;        // per tile
constexpr double kColumnCycles = 3.45;         // per column of a wave: convert, stage, store
constexpr double kBoxCycles = 168;             // per box of a wave: narrow boxes are many stores
constexpr double kExposedEpilogue = 0.75;      // of it, beside another warpgroup's wgmma
constexpr double kExposedMinor = 0.14;         // of the shorter of computing and memory time
constexpr double kExposedL2 = 0.003;           // of L2's time per k-block; decides between equals

// Deepest ring that fits; more stages only let the producer run further ahead.
int MostStages(GemmConfig config) {
  config.num_stages = kMaxStages;
  while (config.smem().total_bytes() > kMaxSmemBytes) --config.num_stages;
  return config.num_stages;
}

// Tile rows per swath: CTAs in flight should cover a rectangle of D whose A rows and B columns
// are about as many bytes, so that L2 serves the most tiles per byte it holds.
int RasterRows(const GemmProblem& problem, const GemmConfig& config) {
  const double rows = config.block_m * config.cluster_m;
  const double columns = config.block_n * config.cluster_n;
  const double clusters = std::max(1, problem.num_sms / config.cluster_size());
  const int best = static_cast<int>(std::lround(std::sqrt(clusters * columns / rows)));
  return std::clamp(best, 1, kMaxGroupedRasterRows);
}

// Rows of tiles. Groups are taken to be of one size: sizes are not known before the kernel runs.
double TileRows(const GemmProblem& problem, const GemmConfig& config) {
  const int64_t rows = int64_t{config.block_m} * config.cluster_m;
  if (problem.grouping == Grouping::kDense) return CeilDiv(problem.m, rows);
  if (problem.grouping == Grouping::kContiguous) {
    // Every other border between groups of an odd number of blocks splits a tile of two blocks.
    const int64_t blocks = CeilDiv(RowsPerGroup(problem), kContiguousAlignment);
    const bool splits = rows > kContiguousAlignment && blocks % 2 != 0;
    return CeilDiv(problem.m, rows) + (splits ? (ActiveGroups(problem) - 1) / 2 : 0);
  }
  return ActiveGroups(problem) * CeilDiv(RowsPerGroup(problem), rows);
}

}  // namespace

std::vector<GemmConfig> Candidates(const GemmProblem& problem) {
  constexpr int kClusters[][3] = {{1, 1, 1}, {2, 1, 1}, {1, 2, 1}, {1, 1, 2}, {1, 1, 4}};
  // Other widths work, but were never fastest by more than 1 %: tiles that begin inside a block of
  // 128 columns in steps of less than 32 pay more for choosing scales and for narrow store boxes
  // than they save in quantisation.
  constexpr int kBlockNs[] = {16, 32, 64, 96, 128, 160, 192, 224, 256};
  std::vector<GemmConfig> candidates;
  for (int block_m : {256, 128, 64}) {
    for (int warpgroups : {1, 2}) {
      for (int block_n : kBlockNs) {
        for (const auto& cluster : kClusters) {
          GemmConfig config = {block_m,    block_n,    1,          warpgroups,
                               cluster[0], cluster[1], cluster[2], 1};
          config.num_stages = MostStages(config);
          config.raster_m = RasterRows(problem, config);
          // Three stages keep loads in flight while one is consumed; fewer starve the tensor cores.
          // A lone warpgroup with more than one wave would leave them idle while it promotes.
          if (config.num_stages < 3 || (warpgroups == 1 && block_m > 64)) continue;
          if (WhyIllegal(problem, config).empty()) candidates.push_back(config);
        }
      }
    }
  }
  return candidates;
}

double EstimateUs(const GemmProblem& problem, const GemmConfig& config) {
  const double block_m = config.block_m;
  const double block_n = config.block_n;
  const double tile_rows = TileRows(problem, config);
  const double tile_columns = CeilDiv(problem.n, int64_t{config.block_n} * config.cluster_n);
  const double tiles = std::max(1.0, tile_rows * tile_columns);  // m = 0 runs nothing
  const double resident = std::min<double>(tiles, ResidentClusters(problem, config.cluster_size()));
  const double rounds = std::ceil(tiles / resident);
  const double k_blocks = CeilDiv(KBlocks(problem), config.cluster_k);

  // One k-block of one CTA, in cycles, by what it waits for.
  const SmemLayout smem = config.smem();
  const int warpgroups = config.math_warpgroups;
  const int waves = smem.waves();
  const double columns = smem.warpgroup_n();
  const double tensor = block_m * block_n / 32;
  const double promote = smem.overlaps_promotion() ? 0 : waves * columns / 2;
  const double math = tensor + (promote + waves * kGapCycles) / warpgroups;
  const double fill = (block_m + block_n) * kBlockK / kSmBytesPerCycle;
  const double shared = (block_m / config.cluster_n + block_n / config.cluster_m) * kBlockK;
  // CTAs that have not drifted apart yet ask for the same lines together, which L2 answers once.
  const double l2_bytes_per_us =
      kL2BytesPerUs * (block_m > kContiguousAlignment && rounds <= 2 ? kInStep : 1);
  const double l2 = shared * resident * config.cluster_size() / l2_bytes_per_us * 1e3 * kClockGhz;
  const double k_block = std::max({math, fill, l2, kMinKBlockCycles}) + kExposedL2 * l2;

  const double boxes = columns / smem.store_cols();
  const double epilogue =
      (kEpilogueCycles + waves * (columns * kColumnCycles + boxes * kBoxCycles)) *
      (warpgroups == 1 ? 1 : kExposedEpilogue);
  const double compute_us = rounds * (k_blocks * k_block + epilogue) / kClockGhz * 1e-3;

  const double m = problem.grouping == Grouping::kMasked
                       ? ActiveGroups(problem) * RowsPerGroup(problem)
                       : problem.m;
  const double n = problem.n, k = problem.k;
  const double memory_us = (m * k + ActiveGroups(problem) * n * k + 2 * m * n) / kHbmBytesPerUs;

  double fixed_us = kLaunchUs;
  if (config.cluster_k > 1) {
    const double exchanged = block_m * block_n * 4 * (config.cluster_k - 1) / config.cluster_k;
    fixed_us += kSplitKUs + exchanged / kExchangeBytesPerUs;
  } else if (config.cluster_size() > 1) {
    fixed_us += kMulticastUs;
  }
  return fixed_us + std::max(compute_us, memory_us) +
         kExposedMinor * std::min(compute_us, memory_us);
}

GemmConfig SelectConfig(const GemmProblem& problem) {
  const std::vector<GemmConfig> candidates = Candidates(problem);
  return *std::min_element(candidates.begin(), candidates.end(),
                           [&](const GemmConfig& a, const GemmConfig& b) {
                             return EstimateUs(problem, a) < EstimateUs(problem, b);
                           });
}

}  // namespace dg
