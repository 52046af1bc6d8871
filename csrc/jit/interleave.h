// FFMA interleaver: a post-pass on the cubin that makes long FFMA runs yield every other
// instruction.
//
// A math warpgroup alternates between issuing wgmma and promoting partial sums with long runs of
// FFMA. If every second FFMA yields, the warp scheduler switches to the other warpgroup within the
// run, and its wgmma gets issued earlier. ptxas 12.9 and later set the bits themselves when the
// kernel contains wgmma and its launch bound is above 256 threads; the pass is for one math
// warpgroup and for older compilers. cache.h runs it between the compiler and the disk.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace dg::jit {

// Whether the pass runs when DG_DISABLE_FFMA_INTERLEAVE is not set. Off, by measurement: with NVRTC
// 13.0 ptxas alternates the yield bit itself in kernels with two math warpgroups, so the pass finds
// nothing to do, and with one it changes no time beyond noise (docs/performance.md). What patches
// machine code has to earn its place. "0" turns it on, for NVRTC 12.8 and older.
inline constexpr bool kInterleaveByDefault = false;

// One run of at least kMinFfmaRun consecutive FFMA instructions, before and after the pass.
struct FfmaRun {
  std::string section;  // ELF section, ".text.<kernel>".
  std::size_t offset;   // Bytes from the section's start to the run's first instruction.
  int length;           // Instructions in the run.
  int reuse_before;     // Those that keep an operand in the reuse cache.
  int reuse_after;
  int yield_before;  // Those that yield.
  int yield_after;
  bool alternating;  // The compiler had alternated the yields, so the run stays as it was.
};

// Shorter runs are address or epilogue arithmetic, not promotion.
inline constexpr int kMinFfmaRun = 16;

// Patches `image`, an sm_90 ELF, in place and returns its runs in file order; running it again
// changes nothing. Throws Error when the image is not a 64-bit ELF whose sections lie inside it.
std::vector<FfmaRun> InterleaveFfma(std::string& image);

}  // namespace dg::jit
