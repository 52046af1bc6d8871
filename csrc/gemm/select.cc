#include "csrc/gemm/select.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "csrc/gemm/cost_model.h"

namespace dg {
namespace {

// Bytes of weights to keep in flight, in microseconds of the memory's peak rate (6.3 MB on an
// H100). Fewer do not cover its latency; more queue up, and some CTAs finish late.
constexpr double kWantedInFlightUs = 1.88125;
constexpr int kFewestStages = 5;

// Bytes of A that stay in L2 while the columns of B pass by: a sixth of an H100's.
constexpr double kSwathBytes = 1 << 23;

// Bytes of B that are taken to be in L2 when the next swath's tiles ask for them again.
constexpr double kKeptWeightBytes = 1 << 25;

// CTAs that ask L2 for the same lines together where there are no clusters. Those of a GPC are 16
// or 18, but swaths that make as many square, 6 rows of 128x256 tiles, were 0.5 % slower.
constexpr int kNearCtas = 32;

// Deepest ring that fits.
int MostStages(GemmConfig config) {
  config.num_stages = kMaxStages;
  while (config.smem().total_bytes() > kMaxSmemBytes) --config.num_stages;
  return config.num_stages;
}

// As many stages as keep the memory busy, if they fit.
int Stages(const GemmProblem& problem, const GemmConfig& config) {
  const double wanted = kWantedInFlightUs * problem.memory_gbs * 1e3;
  const double stages = std::ceil(wanted / Tiling(problem, config).stage_bytes(config)) +
                        (config.smem().queues() ? 1 : 0);
  return static_cast<int>(
      std::min<double>(MostStages(config), std::max<double>(kFewestStages, stages)));
}

// Tile rows per swath of a dense product that splits k: of powers of two, so that few kernels serve
// all m, the height for which the CTAs of a GPC ask L2 for the fewest rows of A and B. Of equals
// the lowest, which was up to 18 % faster than others, but not a single row (where there are more):
// that was up to 28 % slower where B does not stay in L2 until the next row, and 4 to 6 % by mean
// with two rows of tiles. For the same reason all rows are in one swath where B is too large.
int SplitKRasterRows(const GemmProblem& problem, GemmConfig config) {
  const Tiling tiling(problem, config);
  const bool stays = tiling.rounds == 1 || double(problem.n) * problem.k <= kKeptWeightBytes;
  const auto most = std::min<double>(tiling.group_rows, kMaxGroupedRasterRows);
  const double fewest = stays ? std::min(2.0, most) : most;
  double least = std::numeric_limits<double>::infinity();
  int best = 1;
  for (int height = 1; height < 2 * most; height *= 2) {
    if (height < fewest) continue;
    config.raster_m = height;
    const Distinct distinct = DistinctInGpc(tiling, config);
    const double rows = distinct.a * config.block_m + distinct.b * config.block_n;
    if (rows < 0.999 * least) {
      least = rows;
      best = height;
    }
  }
  return best;
}

// Tile rows per swath. CTAs that ask L2 for the same lines together should cover a rectangle of D
// whose A rows and B columns are about as many bytes. Clusters are dealt out to the GPCs by turns,
// so these are all that are in flight; CTAs without clusters are handed out GPC by GPC, and what a
// GPC's ask for is delivered once (scheduler.cuh). Where k is short, a taller swath's rows of A
// stay in L2 from one column of tiles to the next, and B is read less often.
//
// Swaths are of about one height; where clusters share A or B, of a multiple of the GPCs, so that
// each GPC has few rows of them: 8 was 1 % faster than 6 and 7. Those that span groups, whose tiles
// share nothing, are of whole ones, and as tall as makes all CTAs in flight a square: masked
// products with k = 2048 took 1 to 3 % longer with less.
int RasterRows(const GemmProblem& problem, const GemmConfig& config) {
  const bool is_dense = problem.grouping == Grouping::kDense;
  if (is_dense && config.cluster_k > 1) return SplitKRasterRows(problem, config);
  const double rows = config.block_m * config.cluster_m;
  const double columns = config.block_n * config.cluster_n;
  const auto square = [&](double clusters) {
    return std::round(std::sqrt(clusters * columns / rows));
  };
  const double clusters = std::max(1, problem.num_sms / config.cluster_size());
  const double near = config.cluster_size() > 1 ? clusters : kNearCtas;
  const double kept = std::max(1.0, std::floor(kSwathBytes / (rows * problem.k)));
  const double group_rows = Tiling(problem, config).group_rows;
  const auto even = [&](double most) {
    return std::ceil(group_rows / std::ceil(group_rows / most));
  };
  double best = std::min<double>(std::max(square(near), even(kept)), kMaxGroupedRasterRows);
  if (best < group_rows) {
    if (config.cluster_m * config.cluster_n > 1) {
      best = std::max(1.0, std::round(best / kGpcs)) * kGpcs;
      return static_cast<int>(std::min(best, group_rows));
    }
    return static_cast<int>(even(best));
  }
  const double all = std::min<double>(std::max(best, square(clusters)), kMaxGroupedRasterRows);
  // One swath, whatever its height: one kernel for every such m.
  if (is_dense) return static_cast<int>(all);
  return static_cast<int>(std::floor(all / group_rows) * group_rows);
}

// Whether the width is worth a look. Tiles that begin inside a block of 128 columns in steps of 16
// pay for that with narrow store boxes, and more where no loop of their own knows the scales. What
// they may save is quantisation, and that is little where there are many rounds. Where all tiles
// run at once, the next narrower ones would be done sooner if they did, too: more SMs work then,
// which the estimates do not make enough of.
bool WidthMayPay(const GemmProblem& problem, const GemmConfig& config) {
  constexpr double kMostRounds = 6;
  if (config.block_n % 32 == 0 || config.block_n == 16) return true;
  const double rounds = Tiling(problem, config).rounds;
  GemmConfig narrower = config;
  narrower.block_n -= 16;
  return config.smem().loops(KBlocks(problem)) > 1 && config.cluster_k == 1 &&
         rounds <= kMostRounds && (rounds > 1 || Tiling(problem, narrower).rounds > 1);
}

}  // namespace

std::vector<GemmConfig> Candidates(const GemmProblem& problem) {
  constexpr int kClusters[][3] = {{1, 1, 1}, {2, 1, 1}, {1, 2, 1}, {1, 1, 2}, {1, 1, 4}};
  // Other widths work. Steps of 8 were never fastest by more than 1 %; of those of 16 these two are
  // what 128 rows have room for in registers between 128 and 192 columns.
  constexpr int kBlockNs[] = {16, 32, 64, 96, 128, 144, 160, 176, 192, 224, 256};
  std::vector<GemmConfig> candidates;
  // The model takes 128x256 for equal to 256x128, B shared to A shared, and 64x128 to 128x64. The
  // first one wins: less is wasted where groups end, and it was up to 3 and, by mean, 4 % faster.
  for (int block_m : {64, 128, 256}) {
    for (int warpgroups : {1, 2}) {
      for (int block_n : kBlockNs) {
        for (const auto& cluster : kClusters) {
          GemmConfig config = {block_m,    block_n,    1,          warpgroups,
                               cluster[0], cluster[1], cluster[2], 1};
          config.raster_m = RasterRows(problem, config);
          config.num_stages = Stages(problem, config);
          // Three stages keep loads in flight while one is consumed; fewer starve the tensor cores.
          // A lone warpgroup would leave them idle while it promotes, if it has more than one wave
          // or cannot promote under its next wgmma.
          const bool idles =
              warpgroups == 1 && (block_m > 64 || !config.smem().overlaps_promotion());
          if (config.num_stages < 3 || idles || !WidthMayPay(problem, config)) continue;
          if (WhyIllegal(problem, config).empty()) candidates.push_back(config);
        }
      }
    }
  }
  return candidates;
}

GemmConfig SelectConfig(const GemmProblem& problem) {
  GemmConfig best = {};
  double least = std::numeric_limits<double>::infinity();
  for (const GemmConfig& config : Candidates(problem)) {
    const double estimate = EstimateUs(problem, config);
    if (estimate < least) {
      least = estimate;
      best = config;
    }
  }
  return best;
}

}  // namespace dg
