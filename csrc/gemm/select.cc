#include "csrc/gemm/select.h"

#include <algorithm>
#include <cmath>

namespace dg {
namespace {

// What the model knows about a Hopper SXM module (measured on H100, clean L2).
constexpr double kClockGhz = 1.5;            // under a sustained FP8 load, at the power cap
constexpr double kHbmBytesPerUs = 3.0e6;     // copy rate
constexpr double kL2BytesPerUs = 6.5e6;      // TMA loads that hit L2, all SMs together
constexpr double kSmBytesPerCycle = 56;      // what one SM takes in through TMA
constexpr double kLaunchUs = 3.0;            // launch, first loads, last store
constexpr double kTileOverheadCycles = 900;  // epilogue and ramp of a tile, one math warpgroup

constexpr int kMaxRingStages = 32;

// Deepest ring that fits; more stages only let the producer run further ahead.
int MostStages(GemmConfig config) {
  config.num_stages = kMaxRingStages;
  while (config.num_stages > 0 && !config.smem().fits()) --config.num_stages;
  return config.num_stages;
}

// Tile rows per swath: CTAs in flight should cover a rectangle of D whose A rows and B columns
// are about as many bytes, so that L2 serves the most tiles per byte it holds.
int RasterRows(const GemmProblem& problem, const GemmConfig& config) {
  const double rows = double{1} * config.block_m * config.cluster_m;
  const double columns = double{1} * config.block_n * config.cluster_n;
  const double clusters = std::max(1, problem.num_sms / config.cluster_size());
  const int best = static_cast<int>(std::lround(std::sqrt(clusters * columns / rows)));
  return std::max(1, best);
}

// Clusters that can be resident. GPCs have 16 or 18 SMs, so clusters of four strand some.
int ResidentClusters(const GemmProblem& problem, int cluster_size) {
  const int clusters = problem.num_sms / cluster_size;
  return cluster_size == 4 ? std::max(1, clusters * 32 / 33) : clusters;
}

}  // namespace

std::vector<GemmConfig> Candidates(const GemmProblem& problem) {
  constexpr int kClusters[][3] = {{1, 1, 1}, {2, 1, 1}, {1, 2, 1}, {1, 1, 2}, {1, 1, 4}};
  std::vector<GemmConfig> candidates;
  for (int block_m : {64, 128, 256}) {
    for (int warpgroups : {1, 2}) {
      for (int block_n = 16; block_n <= 256; block_n += 8) {
        for (const auto& cluster : kClusters) {
          GemmConfig config = {block_m,    block_n,    1, warpgroups, cluster[0],
                               cluster[1], cluster[2], 1};
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
  const double tile_rows = CeilDiv(problem.m, int64_t{config.block_m} * config.cluster_m);
  const double tile_columns = CeilDiv(problem.n, int64_t{config.block_n} * config.cluster_n);
  const double tiles = tile_rows * tile_columns;
  const double resident = std::min<double>(tiles, ResidentClusters(problem, config.cluster_size()));
  const double waves = std::ceil(tiles / resident);
  const double k_blocks = CeilDiv(KBlocks(problem), config.cluster_k);

  // One k-block of one CTA, in cycles, by what it waits for.
  const SmemLayout smem = config.smem();
  const double tensor = block_m * block_n / 32;
  const double promote = smem.waves() * (smem.warpgroup_n() / 2 + 60);
  const double issue = config.math_warpgroups == 1 ? tensor + promote : tensor / 2 + promote;
  const double fill = (block_m + block_n) * kBlockK / kSmBytesPerCycle;
  const double shared = (block_m / config.cluster_n + block_n / config.cluster_m) * kBlockK;
  const double l2 = shared * resident * config.cluster_size() / kL2BytesPerUs * 1e3 * kClockGhz;
  const double k_block = std::max({tensor, issue, fill, l2});

  // Two warpgroups hide most of each other's epilogue behind their wgmma.
  const double overhead = kTileOverheadCycles * (config.math_warpgroups == 1 ? 1 : 0.5) +
                          (config.cluster_k > 1 ? 1200 : 0);
  const double compute_us = waves * (k_blocks * k_block + overhead) / kClockGhz * 1e-3;

  const double m = problem.m, n = problem.n, k = problem.k;
  const double memory_us = (m * k + n * k + 2 * m * n) / kHbmBytesPerUs;
  return kLaunchUs + std::max(compute_us, memory_us) + 0.1 * std::min(compute_us, memory_us);
}

GemmConfig SelectConfig(const GemmProblem& problem) {
  const std::vector<GemmConfig> candidates = Candidates(problem);
  return *std::min_element(candidates.begin(), candidates.end(),
                           [&](const GemmConfig& a, const GemmConfig& b) {
                             return EstimateUs(problem, a) < EstimateUs(problem, b);
                           });
}

}  // namespace dg
