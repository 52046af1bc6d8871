// FFMA interleaver: a post-pass on the cubin that sets the scheduling hints of long FFMA runs, in
// which a math warpgroup promotes partial sums.
//
// How long 64 FFMAs take beside the other warpgroup's wgmma decides how long tensor cores wait.
// Left alone, ptxas 12.9 and later make every second FFMA yield in kernels with wgmma and more than
// 256 threads, which are those with two math warpgroups. What yields keeps no operand for the next
// one, so the scale, which a run multiplies with, is read again for it, and a yield may cost an
// issue slot; without any, the other warpgroup's next wgmma comes late. One yield in kYieldPeriod,
// and the scale kept in between, is up to 3 % faster (docs/performance.md). Runs of a lone math
// warpgroup, which ptxas lets not yield, stay as they are: yields cost those up to 2 %. So does
// what older compilers make, which never yield. cache.h runs the pass between the compiler and the
// disk.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace dg::jit {

// Every how many instructions of a run one yields. Measured with NVRTC 13.0 on an H100: of 2 to 32,
// 7 is the fastest or within 1 % of it with 128x256, 128x192 and 256x128 tiles. Another number is
// another pass: cache.cc's format.
inline constexpr int kYieldPeriod = 7;

// One run of at least kMinFfmaRun consecutive FFMA instructions, before and after the pass.
struct FfmaRun {
  std::string section;  // ELF section, ".text.<kernel>".
  std::size_t offset;   // Bytes from the section's start to the run's first instruction.
  int length;           // Instructions in the run.
  int reuse_before;     // Those that keep an operand in the reuse cache.
  int reuse_after;
  int yield_before;  // Those that yield.
  int yield_after;
  bool alternates;  // The compiler had made every second one yield; other runs stay as they are.
};

// Shorter runs are address or epilogue arithmetic, not promotion.
inline constexpr int kMinFfmaRun = 16;

// Patches `image`, an sm_90 ELF, in place and returns its runs in file order; running it again
// changes nothing. Throws Error when the image is not a 64-bit ELF whose sections lie inside it.
std::vector<FfmaRun> InterleaveFfma(std::string& image);

}  // namespace dg::jit
