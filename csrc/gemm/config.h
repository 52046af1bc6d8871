// GemmProblem and GemmConfig: what is multiplied, and how one kernel is specialised for it.
// WhyIllegal is the one place that says which configurations exist; the selection (select.h), the
// Python API and the launch code all ask it. No CUDA call, no environment.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/kernels/grouping.h"
#include "csrc/kernels/schedule.h"
#include "csrc/kernels/smem_layout.h"

namespace dg {

// The deepest ring a configuration may have; deeper ones hide no more latency.
constexpr int kMaxStages = 32;

// The FP8 types that tensor cores multiply, either one on either side. The numbers are part of
// exported programs: none may change.
enum class Fp8 : int { kE4M3 = 0, kE5M2 = 1 };

// Peak rate of an H100 SXM's memory: 5120 bits at 2619 MHz, twice a cycle.
constexpr int kH100MemoryGbs = 3352;

// D[m, n] = A[m, k] * B[n, k], on a GPU with num_sms multiprocessors to use. Grouped operations
// have num_groups matrices B, and only the device knows how many rows of A go with each.
struct GemmProblem {
  Grouping grouping;
  int64_t num_groups;  // 1 for a dense problem
  int64_t m;           // rows of A and D, of all groups together
  int64_t expected_m;  // rows of a group that the caller expects; 0: an equal share of m
  int64_t n;
  int64_t k;
  int num_sms;
  Fp8 a_type = Fp8::kE4M3;
  Fp8 b_type = Fp8::kE4M3;
  // A row's bits are to depend on nothing but the row, its matrix, n and k.
  bool batch_invariant = false;
  // Peak rate of the GPU's memory, in GB/s: how much must be in flight to keep it busy.
  int memory_gbs = kH100MemoryGbs;
};

// "e4m3" or "e5m2", as PTX spells them.
const char* Fp8Name(Fp8 type);

// "dense", "contiguous", "masked" or "ragged".
const char* GroupingName(Grouping grouping);

// Tile, pipeline and cluster of one kernel. See csrc/kernels/gemm.cuh.
struct GemmConfig {
  int block_m;          // rows of D per tile: 64 per wave of a math warpgroup
  int block_n;          // columns of D per tile
  int num_stages;       // depth of the shared-memory ring, in k-blocks of 128
  int math_warpgroups;  // warpgroups that multiply; they split rows, or columns (smem_layout.h)
  int cluster_m;        // CTAs along m that share B by TMA multicast
  int cluster_n;        // CTAs along n that share A by TMA multicast
  int cluster_k;        // CTAs that split k and add through distributed shared memory
  int raster_m;         // tile rows (of clusters) per rasterisation swath

  int cluster_size() const { return cluster_m * cluster_n * cluster_k; }
  int threads() const { return kWarpgroupThreads * (1 + math_warpgroups); }
  SmemLayout smem() const { return {block_m, block_n, num_stages, math_warpgroups, cluster_k}; }
};

// Why `problem` can not be computed at all, in the user's terms; empty if it can.
std::string WhyUnsupported(const GemmProblem& problem);

// Why no kernel has such a shape, whatever the problem; empty if one may.
std::string WhyMalformed(const GemmConfig& config);

// Why `config` is no kernel for `problem`; empty if it is.
std::string WhyIllegal(const GemmProblem& problem, const GemmConfig& config);

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// k-blocks of 128, the last one possibly partial.
inline int64_t KBlocks(const GemmProblem& problem) { return CeilDiv(problem.k, kBlockK); }

// Groups with rows, and rows of each, that selection counts on: as many groups as there can be.
int64_t ActiveGroups(const GemmProblem& problem);
int64_t RowsPerGroup(const GemmProblem& problem);

// Clusters that can be resident at the same time. GPCs have 16 or 18 SMs, so clusters of four
// strand some: of the 33 that 132 SMs would hold, 30 were seen to run at once, 31 in two rounds.
int ResidentClusters(const GemmProblem& problem, int cluster_size);

// CTAs to launch: one per SM, in whole clusters that fit at the same time, and none that could not
// have a tile however the rows are grouped, or of a dense problem should not (schedule.h).
int GridSize(const GemmProblem& problem, const GemmConfig& config);

}  // namespace dg
