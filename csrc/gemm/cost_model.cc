#include "csrc/gemm/cost_model.h"

#include <algorithm>
#include <cmath>

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

}  // namespace

Tiling::Tiling(const GemmProblem& problem, const GemmConfig& config)
    : group_rows(std::max(1.0, GroupTileRows(problem, config))) {
  const double columns = CeilDiv(problem.n, int64_t{config.block_n} * config.cluster_n);
  tiles = std::max(1.0, TileRows(problem, config) * columns);  // m = 0 runs nothing
  resident = std::min<double>(tiles, ResidentClusters(problem, config.cluster_size()));
  rounds = std::ceil(tiles / resident);
  last = tiles - resident * (rounds - 1);
}

double Tiling::stage_bytes(const GemmConfig& config) const {
  const double rows = std::min({group_rows, resident, double(config.raster_m)});
  return resident * config.cluster_size() / (rows * config.cluster_m) * config.smem().b_bytes();
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
  // CTAs that have not drifted apart ask for the same lines together, which L2 answers once.
  // With two rows of tiles at most, all of them share A and neighbours B: it was never what limits.
  // Clusters that split k are no neighbours, and share A alone.
  double l2 = 0;
  const bool shares_a_alone = config.cluster_k > 1 && tiling.group_rows > 1;
  if (tiling.group_rows * config.cluster_m > 2 || shares_a_alone) {
    const double run = tiling.rounds * k_blocks;
    const double in_step = 1 + model.in_step / (1 + run / model.drift_k_blocks);
    const double a = block_m / config.cluster_n / in_step;
    const double b = block_n / config.cluster_m / (shares_a_alone ? 1 : in_step);
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
  const double split = shares_a_alone ? 1 + model.split_rows * std::log2(config.cluster_k) : 1;
  return fixed_us + split * (std::max(compute_us, memory_us) +
                             model.exposed_minor * std::min(compute_us, memory_us));
}

}  // namespace dg
