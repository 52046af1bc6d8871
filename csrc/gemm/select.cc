#include "csrc/gemm/select.h"

#include <algorithm>
#include <cmath>

namespace dg {
namespace {

// The model's constants, fitted to 1462 timed (problem, configuration) pairs of 44 problems, dense
// and grouped, on an H100 SXM with a cold, clean L2; for ten more problems of prefill the earlier
// model, fitted to timings of its own, says how configurations compare. On all of them, what it
// selects is 0.5 % slower than the fastest configuration by geometric mean and 6 % at worst; two of
// the (n, k) took no part in the fit and are no worse. docs/performance.md has the sweep.
constexpr double kClockGhz = 1.66;             // while multiplying FP8
constexpr double kHbmShare = 0.875;            // of the peak, streaming weights
constexpr double kL2BytesPerUs = 7.96e6;       // TMA loads that hit L2, all SMs together
constexpr double kInStep = 1.39;               // more of it in the first three rounds
constexpr double kSmBytesPerCycle = 58;        // what one SM takes in through TMA
constexpr double kMinKBlockCycles = 263;       // full wait, wgmma, empty arrival, in a row
constexpr double kMinCopyCycles = 400;         // the same where lanes copy SFA, m no multiple of 4
constexpr double kGapCycles = 64;              // between a wgmma and its warpgroup's next one
constexpr double kLaunchUs = 1.15;             // launch, first loads, last store
constexpr double kSecondWarpgroupUs = 0.2;     // more of it with two math warpgroups
constexpr double kMulticastUs = 1.06;          // more of it in a cluster
constexpr double kSplitKUs = 0.87;             // more of it, beside the exchange of partial sums
constexpr double kExchangeBytesPerUs = 3.5e4;  // of one CTA's partial sums
constexpr double kEpilogueCycles = 416;        // per tile
constexpr double kColumnCycles = 1.53;         // per column of a wave: convert, stage, store
constexpr double kBoxCycles = 77;              // per box of a wave: narrow boxes are many stores
constexpr double kPairedEpilogue = 1.27;       // two warpgroups that store: of one's epilogue
constexpr double kFirstStage = 1.2;            // of a stage's time to arrive, before all else
constexpr double kLastEpilogue = 1.5;          // of an epilogue, after all else
constexpr double kExposedMinor = 0.053;        // of the shorter of computing and memory time
constexpr double kExposedL2 = 0.002;           // of L2's time per k-block
constexpr double kEnergy = 0.05;               // of the tensor cores' work: work costs clock
constexpr double kStoredShare = 0.29;          // of D's bytes that compete with loads

// Bytes of weights in flight, in microseconds of the memory's rate. Fewer do not cover its latency;
// more queue up, and some CTAs finish late.
constexpr double kWantedInFlightUs = 2.15;
constexpr double kShallowUs = 2.07;
constexpr double kShallowCost = 0.72;  // per factor of bytes that are missing
constexpr double kDeepUs = 1.82;
constexpr double kDeepCost = 0.046;   // per factor of bytes that are too many
constexpr double kStageInUse = 0.32;  // stages that are full but not free
constexpr int kFewestStages = 5;

// Bytes of A that stay in L2 while the columns of B pass by: a sixth of an H100's.
constexpr double kSwathBytes = 1 << 23;

double HbmBytesPerUs(const GemmProblem& problem) { return kHbmShare * problem.memory_gbs * 1e3; }

// Rows of tiles in one group. Groups are taken to be of one size: sizes are not known before the
// kernel runs.
double GroupTileRows(const GemmProblem& problem, const GemmConfig& config) {
  const int64_t rows = int64_t{config.block_m} * config.cluster_m;
  return CeilDiv(problem.grouping == Grouping::kDense ? problem.m : RowsPerGroup(problem), rows);
}

// Rows of tiles in all groups.
double TileRows(const GemmProblem& problem, const GemmConfig& config) {
  if (problem.grouping == Grouping::kContiguous) {
    const int64_t rows = int64_t{config.block_m} * config.cluster_m;
    // Every other border between groups of an odd number of blocks splits a tile of two blocks.
    const int64_t blocks = CeilDiv(RowsPerGroup(problem), kContiguousAlignment);
    const bool splits = rows > kContiguousAlignment && blocks % 2 != 0;
    return CeilDiv(problem.m, rows) + (splits ? (ActiveGroups(problem) - 1) / 2 : 0);
  }
  return ActiveGroups(problem) * GroupTileRows(problem, config);
}

// How a problem is cut into tiles, and how many run at the same time.
struct Tiling {
  double group_rows;  // of tiles in a group
  double tiles;       // of clusters, in all groups
  double resident;    // clusters
  double rounds;
  double last;  // tiles of the last round

  Tiling(const GemmProblem& problem, const GemmConfig& config)
      : group_rows(std::max(1.0, GroupTileRows(problem, config))) {
    const double columns = CeilDiv(problem.n, int64_t{config.block_n} * config.cluster_n);
    tiles = std::max(1.0, TileRows(problem, config) * columns);  // m = 0 runs nothing
    resident = std::min<double>(tiles, ResidentClusters(problem, config.cluster_size()));
    rounds = std::ceil(tiles / resident);
    last = tiles - resident * (rounds - 1);
  }

  // Bytes of B in one stage of all CTAs at work; CTAs of one column of tiles have the same.
  double stage_bytes(const GemmConfig& config) const {
    return resident * config.cluster_size() / (std::min(group_rows, resident) * config.cluster_m) *
           config.smem().b_bytes();
  }
};

// Deepest ring that fits.
int MostStages(GemmConfig config) {
  config.num_stages = kMaxStages;
  while (config.smem().total_bytes() > kMaxSmemBytes) --config.num_stages;
  return config.num_stages;
}

// As many stages as keep the memory busy, if they fit.
int Stages(const GemmProblem& problem, const GemmConfig& config) {
  const double wanted = kWantedInFlightUs * HbmBytesPerUs(problem);
  const double stages = std::ceil(wanted / Tiling(problem, config).stage_bytes(config));
  return static_cast<int>(
      std::min<double>(MostStages(config), std::max<double>(kFewestStages, stages)));
}

// Tile rows per swath: CTAs in flight should cover a rectangle of D whose A rows and B columns
// are about as many bytes, so that L2 serves the most tiles per byte it holds. Where k is short, a
// taller swath's rows of A stay in L2 from one column of tiles to the next, and B is read less
// often.
int RasterRows(const GemmProblem& problem, const GemmConfig& config) {
  const double rows = config.block_m * config.cluster_m;
  const double columns = config.block_n * config.cluster_n;
  const double clusters = std::max(1, problem.num_sms / config.cluster_size());
  const double square = std::round(std::sqrt(clusters * columns / rows));
  const double kept = std::max(1.0, std::floor(kSwathBytes / (rows * problem.k)));
  const double group_rows = GroupTileRows(problem, config);
  const double swaths = std::ceil(group_rows / kept);  // of one height
  const double best = std::max(square, swaths > 0 ? std::ceil(group_rows / swaths) : 1);
  return static_cast<int>(std::clamp<double>(best, 1, kMaxGroupedRasterRows));
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
          config.num_stages = Stages(problem, config);
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
  const Tiling tiling(problem, config);
  const double ctas = tiling.resident * config.cluster_size();
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
  // CTAs that have not drifted apart yet ask for the same lines together, which L2 answers once.
  // With two rows of tiles at most, all of them share A and neighbours B: it was never what limits.
  double l2 = 0;
  if (tiling.group_rows * config.cluster_m > 2) {
    const double shared = (block_m / config.cluster_n + block_n / config.cluster_m) * kBlockK;
    const double rate = kL2BytesPerUs * (tiling.rounds <= 3 ? kInStep : 1);
    l2 = shared * ctas / rate * 1e3 * kClockGhz;
  }
  const double shortest = problem.m % 4 == 0 ? kMinKBlockCycles : kMinCopyCycles;
  const double k_block = std::max({math, fill, l2, shortest}) + kExposedL2 * l2;

  const double boxes = columns / smem.store_cols();
  const double epilogue =
      (kEpilogueCycles + waves * (columns * kColumnCycles + boxes * kBoxCycles)) *
      (warpgroups == 1 ? 1 : kPairedEpilogue);
  const double work = tiling.tiles * config.cluster_size() / problem.num_sms * k_blocks * tensor;
  const double compute_us =
      (tiling.rounds * (k_blocks * k_block + epilogue) + kEnergy * work) / kClockGhz * 1e-3;

  // Weights come more slowly where too few or too many of their bytes are in flight, as few are in
  // a last round without tiles for all.
  const double in_flight_us =
      tiling.stage_bytes(config) * (config.num_stages - kStageInUse) / HbmBytesPerUs(problem);
  const auto slowdown = [](double us) {
    return 1 + kShallowCost * std::max(0.0, kShallowUs / us - 1) +
           kDeepCost * std::max(0.0, us / kDeepUs - 1);
  };
  const double last_share = tiling.last / tiling.tiles;
  const double last_in_flight_us = in_flight_us * std::max(0.05, tiling.last / tiling.resident);
  const double slow =
      (1 - last_share) * slowdown(in_flight_us) + last_share * slowdown(last_in_flight_us);
  const double m = problem.grouping == Grouping::kMasked
                       ? ActiveGroups(problem) * RowsPerGroup(problem)
                       : problem.m;
  const double n = problem.n, k = problem.k;
  const double memory_us =
      (m * k + slow * ActiveGroups(problem) * n * k + kStoredShare * 2 * m * n) /
      HbmBytesPerUs(problem);

  double fixed_us = kLaunchUs + (kFirstStage * fill + kLastEpilogue * epilogue) / kClockGhz * 1e-3;
  if (warpgroups == 2) fixed_us += kSecondWarpgroupUs;
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
