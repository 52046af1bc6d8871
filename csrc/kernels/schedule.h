// How many clusters share a launch's tiles.
//
// Compiled twice, like smem_layout.h: by the host, which launches so many where it knows the tiles
// (csrc/gemm), and by the device compiler, where only the device does. Plain C++17 without
// includes, because the device side has no standard library.
#pragma once

namespace dg {

// Where the tensor cores set the pace, they do so at the clock that the power limit leaves them.
// CTAs that would have no tile in the last round then do better to have none at all: the same
// number of rounds at a higher clock. With few k-blocks per tile, memory sets the pace and takes
// all SMs. Measured with 256x128 tiles; 128x256 ones, or nearly, do the same work.
constexpr bool leaves_sms_idle(int block_m, int block_n, int cluster_m, long long k_blocks) {
  return (block_m * cluster_m > 128 || block_m * block_n > 128 * 192) && k_blocks >= 16;
}

}  // namespace dg
