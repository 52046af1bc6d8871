// Which kernel runs: every legal configuration worth considering and the deterministic choice
// among them, by their estimated times (cost_model.h). No measurement at run time: the same problem
// on the same number of SMs, with memory of the same rate, always gets the same kernel, and so the
// same bits.
#pragma once

#include <vector>

#include "csrc/gemm/config.h"

namespace dg {

// The configurations that selection chooses among, in a fixed order. All are legal.
std::vector<GemmConfig> Candidates(const GemmProblem& problem);

// The candidate with the lowest estimate; on a tie the first, which is the one with lower tiles.
GemmConfig SelectConfig(const GemmProblem& problem);

}  // namespace dg
