// An estimate of a kernel's time, made to compare configurations of one problem. Its constants were
// fitted to timings; benchmarks/fit.py fits them anew to sweeps of the harness.
#pragma once

#include <iterator>

#include "csrc/gemm/config.h"

namespace dg {

// The constants, fitted to sweeps of 58 problems each (DeepGEMM's dense and grouped shapes,
// decode): 1344 timed pairs of problem and configuration on an H100, 793 on an H200, with a cold,
// clean L2. The H100's kernels began 0.4 us later than now, which was taken off their times. On
// them, what is selected is 0.4 and 0.7 % slower than the fastest configuration by geometric mean
// and 4 and 5 % at worst. hbm_share, the bytes in flight and stage_in_use are of an earlier fit, to
// sweeps with other depths of ring and many groups, which these have nothing to say of.
struct CostModel {
  double clock_ghz = 1.66;               // while multiplying FP8
  double hbm_share = 0.875;              // of the peak, streaming weights
  double l2_bytes_per_us = 8.04e6;       // TMA loads that hit L2, all SMs together
  double in_step = 1.77;                 // more of it in the first three rounds
  double sm_bytes_per_cycle = 60.6;      // what one SM takes in through TMA
  double min_k_block_cycles = 234;       // the least, however small the tile
  double gap_cycles = 53.6;              // between a wgmma and its warpgroup's next one
  double launch_us = 1.27;               // launch, first loads, last store
  double second_warpgroup_us = 0.147;    // more of it with two math warpgroups
  double multicast_us = 0.987;           // more of it in a cluster
  double split_k_us = 0.481;             // more of it, beside the exchange of partial sums
  double exchange_bytes_per_us = 3.8e4;  // of one CTA's partial sums
  double epilogue_cycles = 437;          // per tile
  double column_cycles = 0.894;          // per column of a wave: convert, stage, store
  double box_cycles = 129;               // per box of a wave: narrow boxes are many stores
  double paired_epilogue = 0.997;        // two warpgroups that store: of one's epilogue
  double first_stage = 1.57;             // of a stage's time to arrive, before all else
  double last_epilogue = 1.04;           // of an epilogue, after all else
  double split_rows = 0.22;              // of all that is not fixed, per halving of k where there
                                         // are more rows of tiles than one
  double exposed_minor = 0.0263;         // of the shorter of computing and memory time
  double exposed_l2 = 0.00103;           // of L2's time per k-block
  double energy = 0.0248;                // of the tensor cores' work: work costs clock
  double stored_share = 0.272;           // of D's bytes that compete with loads
  // Bytes of weights in flight, in microseconds of the memory's rate: fewer do not cover its
  // latency; more queue up, and some CTAs finish late.
  double shallow_us = 2.07;
  double shallow_cost = 0.72;  // per factor of bytes that are missing
  double deep_us = 1.82;
  double deep_cost = 0.046;    // per factor of bytes that are too many
  double stage_in_use = 0.32;  // stages that are full but not free, beside one where a wave queues
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
    {"sm_bytes_per_cycle", &CostModel::sm_bytes_per_cycle},
    {"min_k_block_cycles", &CostModel::min_k_block_cycles},
    {"gap_cycles", &CostModel::gap_cycles},
    {"launch_us", &CostModel::launch_us},
    {"second_warpgroup_us", &CostModel::second_warpgroup_us},
    {"multicast_us", &CostModel::multicast_us},
    {"split_k_us", &CostModel::split_k_us},
    {"exchange_bytes_per_us", &CostModel::exchange_bytes_per_us},
    {"epilogue_cycles", &CostModel::epilogue_cycles},
    {"column_cycles", &CostModel::column_cycles},
    {"box_cycles", &CostModel::box_cycles},
    {"paired_epilogue", &CostModel::paired_epilogue},
    {"first_stage", &CostModel::first_stage},
    {"last_epilogue", &CostModel::last_epilogue},
    {"split_rows", &CostModel::split_rows},
    {"exposed_minor", &CostModel::exposed_minor},
    {"exposed_l2", &CostModel::exposed_l2},
    {"energy", &CostModel::energy},
    {"stored_share", &CostModel::stored_share},
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
  double tiles;       // of clusters, in all groups, at least 1
  double resident;    // clusters
  double rounds;
  double last;  // tiles of the last round

  Tiling(const GemmProblem& problem, const GemmConfig& config);

  // Bytes of B in one stage of all CTAs at work; CTAs of one column of tiles have the same.
  double stage_bytes(const GemmConfig& config) const;
};

// Estimated kernel time in microseconds.
double EstimateUs(const GemmProblem& problem, const GemmConfig& config,
                  const CostModel& model = {});

}  // namespace dg
