#include "csrc/gemm/config.h"

#include <algorithm>
#include <limits>
#include <string>

namespace dg {
namespace {

// More rows than this per swath would only be one swath.
constexpr int kMaxRasterRows = 1024;

// The exchange of partial sums takes some more than kMaxAccumulators leave.
constexpr int kMaxSplitKAccumulators = 176;

std::string Sentence(const std::string& name, int value, const std::string& rule) {
  return name + " must be " + rule + ", got " + std::to_string(value);
}

// Row tiles that there can be, however the rows are grouped. Every run of rows can end inside a
// tile: those of a group, under masked the rest of its rows, under ragged the rows before and after
// all groups. Contiguous blocks can each have another group than the one before.
int64_t MostRowTiles(const GemmProblem& problem, const GemmConfig& config) {
  const int64_t rows = int64_t{config.block_m} * config.cluster_m;
  switch (problem.grouping) {
    case Grouping::kDense:
      return CeilDiv(problem.m, rows);
    case Grouping::kContiguous:
      return CeilDiv(problem.m, std::min<int64_t>(rows, kContiguousAlignment));
    case Grouping::kMasked:
      return std::min(problem.m, CeilDiv(problem.m, rows) + 2 * problem.num_groups);
    case Grouping::kRagged:
      return std::min(problem.m, CeilDiv(problem.m, rows) + problem.num_groups + 2);
  }
  return problem.m;
}

}  // namespace

const char* GroupingName(Grouping grouping) {
  switch (grouping) {
    case Grouping::kDense:
      return "dense";
    case Grouping::kContiguous:
      return "contiguous";
    case Grouping::kMasked:
      return "masked";
    case Grouping::kRagged:
      return "ragged";
  }
  return "unknown";
}

const char* Fp8Name(Fp8 type) { return type == Fp8::kE4M3 ? "e4m3" : "e5m2"; }

std::string WhyUnsupported(const GemmProblem& problem) {
  // Coordinates are int32, also those of a tile that begins at the last row or column.
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() - 65536;
  const auto limit = [](const char* name, int64_t value) {
    return std::string(name) + " must be at most " + std::to_string(kMax) + ", got " +
           std::to_string(value);
  };
  if (problem.m < 0) return "m must not be negative, got " + std::to_string(problem.m);
  if (problem.m > kMax) return limit("m", problem.m);
  if (problem.n <= 0 || problem.n % 8 != 0) {
    return "n must be a positive multiple of 8, got " + std::to_string(problem.n);
  }
  if (problem.n > kMax) return limit("n", problem.n);
  if (problem.k <= 0 || problem.k % 16 != 0) {
    return "k must be a positive multiple of 16, got " + std::to_string(problem.k);
  }
  if (problem.k > kMax) return limit("k", problem.k);
  // The smallest tiles are 64 x 16, and tiles are counted in 32 bits.
  constexpr int64_t kMaxElements = int64_t{1} << 40;
  if (problem.m > kMaxElements / problem.n) {
    return "m * n must be at most 2^40, got " + std::to_string(problem.m) + " * " +
           std::to_string(problem.n);
  }
  if (problem.num_groups < 1) {
    return "there must be at least one group, got " + std::to_string(problem.num_groups);
  }
  if (problem.grouping == Grouping::kDense && problem.num_groups != 1) {
    return "num_groups must be 1 for a dense problem, got " + std::to_string(problem.num_groups);
  }
  if (problem.grouping == Grouping::kMasked && problem.m % problem.num_groups != 0) {
    return "m must be a multiple of num_groups for a masked problem, got " +
           std::to_string(problem.m) + " and " + std::to_string(problem.num_groups);
  }
  if (problem.num_groups > kMax / problem.n) {
    return "num_groups * n must be at most " + std::to_string(kMax) + ", got " +
           std::to_string(problem.num_groups) + " * " + std::to_string(problem.n);
  }
  if (problem.expected_m < 0) {
    return "expected_m must not be negative, got " + std::to_string(problem.expected_m);
  }
  if (problem.expected_m > kMax) return limit("expected_m", problem.expected_m);
  if (problem.num_sms < 1) {
    return "num_sms must be at least 1, got " + std::to_string(problem.num_sms);
  }
  return "";
}

std::string WhyMalformed(const GemmConfig& config) {
  const int warpgroups = config.math_warpgroups;
  if (config.block_m != 64 && config.block_m != 128 && config.block_m != 256) {
    return Sentence("block_m", config.block_m, "64, 128 or 256");
  }
  if (warpgroups != 1 && warpgroups != 2) {
    return Sentence("math_warpgroups", warpgroups, "1 or 2");
  }
  if (warpgroups == 1 && config.block_m > 128) {
    return Sentence("block_m", config.block_m, "at most 128 with one math warpgroup");
  }
  if (config.block_n < 16 || config.block_n > 256 || config.block_n % 8 != 0) {
    return Sentence("block_n", config.block_n, "a multiple of 8 between 16 and 256");
  }
  const SmemLayout smem = config.smem();
  if (config.block_n % (smem.splits_rows() ? 8 : 8 * warpgroups) != 0) {
    return Sentence("block_n", config.block_n,
                    "a multiple of 16 where two warpgroups split a tile's columns");
  }
  const int clusters[] = {config.cluster_m, config.cluster_n, config.cluster_k};
  if (std::count(std::begin(clusters), std::end(clusters), 1) < 2) {
    return "only one of cluster_m, cluster_n and cluster_k may be above 1";
  }
  if (config.cluster_m < 1 || config.cluster_m > 2) {
    return Sentence("cluster_m", config.cluster_m, "1 or 2");
  }
  if (config.cluster_n < 1 || config.cluster_n > 2) {
    return Sentence("cluster_n", config.cluster_n, "1 or 2");
  }
  if (config.cluster_k != 1 && config.cluster_k != 2 && config.cluster_k != 4) {
    return Sentence("cluster_k", config.cluster_k, "1, 2 or 4");
  }
  if (config.block_n % (8 * config.cluster_m) != 0) {
    return Sentence("block_n", config.block_n,
                    "a multiple of 16 with cluster_m = 2: each CTA loads whole 8-row groups");
  }
  if (config.cluster_k > 1 && smem.waves() > 1) {
    return "cluster_k > 1 needs one wave of 64 rows per math warpgroup";
  }
  const int accumulators = smem.accumulators();
  const int limit = config.cluster_k > 1 ? kMaxSplitKAccumulators : kMaxAccumulators;
  if (accumulators > limit) {
    return "a tile of " + std::to_string(config.block_m) + "x" + std::to_string(config.block_n) +
           " needs " + std::to_string(accumulators) + " accumulator registers per thread of " +
           std::to_string(warpgroups) + " math warpgroups, the limit is " + std::to_string(limit);
  }
  if (config.num_stages < 2 || config.num_stages > kMaxStages) {
    return Sentence("num_stages", config.num_stages, "between 2 and " + std::to_string(kMaxStages));
  }
  if (smem.total_bytes() > kMaxSmemBytes) {
    return Sentence("num_stages", config.num_stages,
                    "small enough for " + std::to_string(kMaxSmemBytes) +
                        " bytes of shared memory (this needs " +
                        std::to_string(smem.total_bytes()) + ")");
  }
  if (config.raster_m < 1 || config.raster_m > kMaxRasterRows) {
    return Sentence("raster_m", config.raster_m, "between 1 and " + std::to_string(kMaxRasterRows));
  }
  return "";
}

std::string WhyIllegal(const GemmProblem& problem, const GemmConfig& config) {
  if (const std::string why = WhyMalformed(config); !why.empty()) return why;
  if (problem.grouping != Grouping::kDense) {
    if (config.cluster_m > 1) {
      return Sentence("cluster_m", config.cluster_m,
                      "1 for grouped operations: CTAs that share B must work on one group");
    }
    if (config.raster_m > kMaxGroupedRasterRows) {
      return Sentence("raster_m", config.raster_m,
                      "at most " + std::to_string(kMaxGroupedRasterRows) +
                          " for grouped operations: a lane looks up each row");
    }
  }
  if (config.cluster_size() > problem.num_sms) {
    return "a cluster of " + std::to_string(config.cluster_size()) + " CTAs needs as many SMs, " +
           "but num_sms is " + std::to_string(problem.num_sms);
  }
  if (problem.batch_invariant && config.cluster_k > 1) {
    return Sentence("cluster_k", config.cluster_k,
                    "1 with batch_invariant: how k is split must not depend on m");
  }
  if (KBlocks(problem) < config.cluster_k) {
    return Sentence("cluster_k", config.cluster_k,
                    "at most the number of k-blocks (" + std::to_string(KBlocks(problem)) + ")");
  }
  const int64_t columns = CeilDiv(problem.n, int64_t{config.block_n} * config.cluster_n);
  if (config.raster_m * columns > std::numeric_limits<int32_t>::max()) {
    return Sentence("raster_m", config.raster_m, "smaller for so many columns of tiles");
  }
  return "";
}

int64_t ActiveGroups(const GemmProblem& problem) {
  return std::max<int64_t>(1, std::min(problem.num_groups, problem.m));
}

int64_t RowsPerGroup(const GemmProblem& problem) {
  return problem.expected_m > 0 ? problem.expected_m : CeilDiv(problem.m, ActiveGroups(problem));
}

int ResidentClusters(const GemmProblem& problem, int cluster_size) {
  const int clusters = problem.num_sms / cluster_size;
  return cluster_size == 4 ? std::max(1, clusters * 10 / 11) : clusters;
}

int GridSize(const GemmProblem& problem, const GemmConfig& config) {
  const int64_t tiles = MostRowTiles(problem, config) *
                        CeilDiv(problem.n, int64_t{config.block_n} * config.cluster_n);
  int64_t clusters = std::min<int64_t>(tiles, ResidentClusters(problem, config.cluster_size()));
  if (problem.grouping == Grouping::kDense && clusters > 0 &&
      leaves_sms_idle(config.block_m, config.block_n, config.cluster_m, KBlocks(problem))) {
    clusters = CeilDiv(tiles, CeilDiv(tiles, clusters));
  }
  return static_cast<int>(clusters) * config.cluster_size();
}

}  // namespace dg
