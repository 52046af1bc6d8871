#include "csrc/gemm/cost_model.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace dg {
namespace {

// Rows of one group, or of all that a dense product has.
int64_t GroupRows(const GemmProblem& problem) {
  return problem.grouping == Grouping::kDense ? problem.m : RowsPerGroup(problem);
}

// Rows of tiles in one group.
double GroupTileRows(const GemmProblem& problem, const GemmConfig& config) {
  return CeilDiv(GroupRows(problem), int64_t{config.block_m} * config.cluster_m);
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

template <typename T>
size_t CountDistinct(std::vector<T>& values) {
  std::sort(values.begin(), values.end());
  return std::unique(values.begin(), values.end()) - values.begin();
}

}  // namespace

Tiling::Tiling(const GemmProblem& problem, const GemmConfig& config)
    : group_rows(std::max(1.0, GroupTileRows(problem, config))) {
  columns = CeilDiv(problem.n, int64_t{config.block_n} * config.cluster_n);
  tiles = std::max(1.0, TileRows(problem, config) * columns);  // m = 0 runs nothing
  resident = std::min<double>(tiles, ResidentClusters(problem, config.cluster_size()));
  rounds = std::ceil(tiles / resident);
  last = tiles - resident * (rounds - 1);
}

double Tiling::stage_bytes(const GemmConfig& config) const {
  const double rows = std::min({group_rows, resident, double(config.raster_m)});
  return std::min(tiles / group_rows, resident / rows) * config.cluster_size() / config.cluster_m *
         config.smem().b_bytes();
}

Distinct DistinctInGpc(const Tiling& tiling, const GemmConfig& config) {
  const int resident = static_cast<int>(tiling.resident);
  const int raster = config.raster_m;
  // No tile after the resident ones is looked at.
  const int swath_tiles = static_cast<int>(std::min(raster * tiling.columns, tiling.resident));
  const int group_rows = static_cast<int>(std::min(tiling.group_rows, tiling.resident));
  const double rows = std::max(1.0, tiling.tiles / tiling.columns);
  std::vector<int> a;
  std::vector<std::pair<int, int>> b;  // group, column
  size_t distinct_a = 0, distinct_b = 0;
  for (int gpc = 0; gpc < kGpcs; ++gpc) {
    a.clear();
    b.clear();
    for (int tile = gpc; tile < resident; tile += kGpcs) {
      const int swath = tile / swath_tiles, in_swath = tile % swath_tiles;
      const int height = static_cast<int>(std::min<double>(raster, rows - swath * raster));
      const int row = swath * raster + in_swath % height;
      a.push_back(row);
      b.emplace_back(row / group_rows, in_swath / height);
    }
    distinct_a += CountDistinct(a);
    distinct_b += CountDistinct(b);
  }
  return {double(distinct_a) / resident, double(distinct_b) / resident};
}

double EstimateUs(const GemmProblem& problem, const GemmConfig& config, const CostModel& model) {
  const double hbm_bytes_per_us = model.hbm_share * problem.memory_gbs * 1e3;
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
  const double math = tensor + (promote + waves * model.gap_cycles) / warpgroups;
  const double a_rows = std::min<double>(block_m, GroupRows(problem));
  const double fill = (a_rows + block_n) * kBlockK / model.sm_bytes_per_cycle;
  // CTAs drift apart with the k-blocks behind them. Until then those of a GPC ask L2 for the same
  // lines together, which it answers once. Where clusters split k, which ones depends on the
  // swaths; of others in_step is what came out. With two rows of tiles at most, all of these share
  // A and neighbours B: it was never what limits.
  double l2 = 0;
  const bool splits_rows = config.cluster_k > 1 && tiling.group_rows > 1;
  if (tiling.group_rows * config.cluster_m > 2 || splits_rows) {
    const double drift = 1 + tiling.rounds * k_blocks / model.drift_k_blocks;
    double a = block_m / config.cluster_n, b = block_n / config.cluster_m;
    if (splits_rows) {
      const Distinct distinct = DistinctInGpc(tiling, config);
      const double together = std::min(1.0, model.split_in_step / drift);
      a *= 1 - (1 - distinct.a) * together;
      b *= 1 - (1 - distinct.b) * together;
    } else {
      const double in_step = 1 + model.in_step / drift;
      a /= in_step;
      b /= in_step;
    }
    l2 = (a + b) * kBlockK * ctas / model.l2_bytes_per_us * 1e3 * model.clock_ghz;
  }
  const double least = model.min_k_block_cycles + waves * columns * model.column_k_block_cycles +
                       (warpgroups - 1) * model.paired_k_block_cycles;
  const double k_block = std::max({math, fill, l2, least});

  // What a k-block of the last column of tiles takes more. Its rows of B past n are zeros, which
  // TMA is slower to fill in than rows to copy (groups have the next one's rows there).
  const double zeros = problem.grouping == Grouping::kDense
                           ? CeilDiv(problem.n, config.block_n) * block_n - double(problem.n)
                           : 0;
  const double zero_cycles = model.zero_row_cycles - kBlockK / model.sm_bytes_per_cycle;
  const double tail = std::max(0.0, fill + zeros * zero_cycles - k_block);

  const double boxes = columns / smem.store_cols();
  const double own_epilogue = waves * (columns * model.column_cycles + boxes * model.box_cycles);
  const double epilogue = own_epilogue * (warpgroups == 1 ? 1 : model.paired_epilogue);
  const double work = tiling.tiles * config.cluster_size() / problem.num_sms * k_blocks * tensor;
  const double compute_us =
      (tiling.rounds * (k_blocks * k_block + epilogue) + k_blocks * tail + model.energy * work) /
      model.clock_ghz * 1e-3;

  // Weights come more slowly where too few or too many of their bytes are in flight, as few are in
  // a last round without tiles for all.
  const double in_use = model.stage_in_use + (smem.queues() ? 1 : 0);
  const double in_flight_us =
      tiling.stage_bytes(config) * (config.num_stages - in_use) / hbm_bytes_per_us;
  const auto slowdown = [&](double us) {
    return 1 + model.shallow_cost * std::max(0.0, model.shallow_us / us - 1) +
           model.deep_cost * std::max(0.0, us / model.deep_us - 1);
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
      (m * k + slow * ActiveGroups(problem) * n * k + model.stored_share * 2 * m * n) /
          hbm_bytes_per_us +
      (tiling.rounds - 1) * model.tile_us;

  double fixed_us =
      model.launch_us +
      (model.first_stage * fill + model.last_epilogue * own_epilogue) / model.clock_ghz * 1e-3;
  if (warpgroups == 2) fixed_us += model.second_warpgroup_us;
  if (config.cluster_k > 1) {
    const double exchanged =
        block_m * block_n * 4 / warpgroups * (config.cluster_k - 1) / config.cluster_k;
    fixed_us += exchanged / model.exchange_bytes_per_us;
  } else if (config.cluster_size() > 1) {
    fixed_us += model.multicast_us;
  }
  return fixed_us + std::max(compute_us, memory_us) +
         model.exposed_minor * std::min(compute_us, memory_us);
}

}  // namespace dg
