// Which kernel runs: every legal configuration worth considering, an estimate of its time, and the
// deterministic choice among them. No measurement at run time: the same problem on the same number
// of SMs, with memory of the same rate, always gets the same kernel, and so the same bits.
#pragma once

#include <vector>

#include "csrc/gemm/config.h"

namespace dg {

// The configurations that selection chooses among, in a fixed order. All are legal.
std::vector<GemmConfig> Candidates(const GemmProblem& problem);

// Estimated kernel time in microseconds. Meant for comparing configurations of one problem.
double EstimateUs(const GemmProblem& problem, const GemmConfig& config);

// The candidate with the lowest estimate; on a tie the first, which is the one with taller tiles.
GemmConfig SelectConfig(const GemmProblem& problem);

}  // namespace dg
