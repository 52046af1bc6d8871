// Which kernels leave those SMs idle in every round that would have no tile in the last one.
//
// Compiled twice, like smem_layout.h: by the host, which launches fewer clusters where it knows how
// many tiles there are (GridSize), and by the device compiler, where only the device knows
// (scheduler.cuh). Plain C++17 without includes, because the device side has no standard library.
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
