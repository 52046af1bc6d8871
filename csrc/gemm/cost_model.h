// An estimate of a kernel's time, made to compare configurations of one problem. Its constants were
// fitted to timings; benchmarks/fit.py fits them anew to sweeps of the harness.
#pragma once

#include <iterator>

#include "csrc/gemm/config.h"

namespace dg {

// The constants, fitted together to sweeps with a cold, clean L2: every named shape on an H100 and
// on an H200 (180), and on an H200 45 others of 512 to 32768 rows, two thirds of 96 of up to 256,
// three quarters of 250 drawn at random, and those for the widths 144 and 176. Two of them,
// split_in_step and exchange_bytes_per_us, were chosen afterwards, the others as they were, for 106
// more products that may split k. They are what makes the choices right, not measurements: a clock
// that no GPU has, for one. On an H200, what is selected is 0.9 % slower than the fastest of
// the timed configurations of named shapes by geometric mean and 9 % at worst, 0.7 and 6 % on those
// 45, 0.8 and 15 % on the 96, 1.8 and 29 % on the 250, 0.5 and 13 % on the 55 for the widths, 1.8
// and 18 % on the 106; on an H100 0.9 and 7 %, by sweeps of older kernels. (Of several heights of
// swaths, the one closest to today's counts.) benchmarks/results has the sweeps.
struct CostModel {
  double clock_ghz = 2.43;               // while multiplying FP8
  double hbm_share = 0.95;               // of the peak, streaming weights
  double l2_bytes_per_us = 8.82e6;       // TMA loads that hit L2, all SMs together
  double in_step = 2.57;                 // times as much more while CTAs are in step
  double split_in_step = 0.87;           // where k is split: of what a GPC asks for twice
  double drift_k_blocks = 76.7;          // k-blocks of a CTA after which half of that is gone
  double sm_bytes_per_cycle = 60.9;      // what one SM takes in through TMA
  double min_k_block_cycles = 257;       // of the narrowest tile
  double column_k_block_cycles = 1.27;   // more of it, per column of a warpgroup's waves
  double paired_k_block_cycles = 112;    // more of it with two math warpgroups
  double gap_cycles = 109;               // between a wgmma and its warpgroup's next one
  double launch_us = 0.822;              // launch, and what else every kernel takes
  double second_warpgroup_us = 0.369;    // more of it with two math warpgroups
  double multicast_us = 2.39;            // more of it in a cluster
  double exchange_bytes_per_us = 1.2e4;  // of one CTA's partial sums
  double column_cycles = 3.94;           // per column of a wave: convert, stage, store
  double box_cycles = 158;               // per box of a wave: narrow boxes are many stores
  double paired_epilogue = 1.33;         // two warpgroups that store: of one's epilogue
  double first_stage = 1.21;             // of a stage's time to arrive, before all else
  double last_epilogue = 3.47;           // of one warpgroup's epilogue, after all else
  double exposed_minor = 0.228;          // of the shorter of computing and memory time
  double energy = 0.321;                 // of the tensor cores' work: work costs clock
  double stored_share = 0.263;           // of D's bytes that compete with loads
  double tile_us = 0.115;                // without loads, per tile but the first
  double zero_row_cycles = 4.31;         // TMA's, for a row of B past n, which it fills with zeros
  // Bytes of weights in flight, in microseconds of the memory's rate: fewer do not cover its
  // latency; more queue up, and some CTAs finish late.
  double shallow_us = 1.35;
  double shallow_cost = 0.675;  // per factor of bytes that are missing
  double deep_us = 2.54;
  double deep_cost = 0.149;     // per factor of bytes that are too many
  double stage_in_use = 0.262;  // stages that are full but not free, beside one where a wave queues
};

// The constants by name, for who fits them.
struct CostConstant {
  const char* name;
  double CostModel::* value;
};
inline constexpr CostConstant kCostConstants[] = {
    {"clock_ghz", &CostModel::clock_ghz},
    {"hbm_share", &CostModel::hbm_share},
    {"l2_bytes_per_us", &CostModel::l2_bytes_per_us},
    {"in_step", &CostModel::in_step},
    {"split_in_step", &CostModel::split_in_step},
    {"drift_k_blocks", &CostModel::drift_k_blocks},
    {"sm_bytes_per_cycle", &CostModel::sm_bytes_per_cycle},
    {"min_k_block_cycles", &CostModel::min_k_block_cycles},
    {"column_k_block_cycles", &CostModel::column_k_block_cycles},
    {"paired_k_block_cycles", &CostModel::paired_k_block_cycles},
    {"gap_cycles", &CostModel::gap_cycles},
    {"launch_us", &CostModel::launch_us},
    {"second_warpgroup_us", &CostModel::second_warpgroup_us},
    {"multicast_us", &CostModel::multicast_us},
    {"exchange_bytes_per_us", &CostModel::exchange_bytes_per_us},
    {"column_cycles", &CostModel::column_cycles},
    {"box_cycles", &CostModel::box_cycles},
    {"paired_epilogue", &CostModel::paired_epilogue},
    {"first_stage", &CostModel::first_stage},
    {"last_epilogue", &CostModel::last_epilogue},
    {"exposed_minor", &CostModel::exposed_minor},
    {"energy", &CostModel::energy},
    {"stored_share", &CostModel::stored_share},
    {"tile_us", &CostModel::tile_us},
    {"zero_row_cycles", &CostModel::zero_row_cycles},
    {"shallow_us", &CostModel::shallow_us},
    {"shallow_cost", &CostModel::shallow_cost},
    {"deep_us", &CostModel::deep_us},
    {"deep_cost", &CostModel::deep_cost},
    {"stage_in_use", &CostModel::stage_in_use},
};
static_assert(sizeof(CostModel) == std::size(kCostConstants) * sizeof(double));

// How a problem is cut into tiles, and how many run at the same time. Groups are taken to be of one
// size: sizes are not known before the kernel runs.
struct Tiling {
  double group_rows;  // rows of tiles in a group, at least 1
  double columns;     // of tiles
  double tiles;       // of clusters, in all groups, at least 1
  double resident;    // clusters
  double rounds;
  double last;  // tiles of the last round

  Tiling(const GemmProblem& problem, const GemmConfig& config);

  // Bytes of B in one stage of all CTAs at work; those of one column of a swath have the same.
  double stage_bytes(const GemmConfig& config) const;
};

// Of 132 SMs, six GPCs have 16 and two 18. Clusters of two are handed out to them by turns, as
// %smid says; those of four are taken to be, too.
inline constexpr int kGpcs = 8;

// Of the tiles of A and of B that the clusters of a GPC multiply in the first round, the part that
// differ: 1 where each has its own. What a GPC's CTAs ask L2 for at the same time is delivered
// once.
struct Distinct {
  double a;
  double b;
};
Distinct DistinctInGpc(const Tiling& tiling, const GemmConfig& config);

// Estimated kernel time in microseconds.
double EstimateUs(const GemmProblem& problem, const GemmConfig& config,
                  const CostModel& model = {});

}  // namespace dg
