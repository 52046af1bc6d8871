// B's scales on their way from global memory into the promotion.
//
// A warpgroup's columns touch at most kScaleBlocks blocks of 128, each with one scale per k-block.
// Going through the shared-memory ring would need aligned rows, which SFB does not have, and a
// barrier per tile would keep the warpgroups from drifting apart. Instead each warp reads ahead:
// lane l holds the scales of k-block c + l, a warp 32 k-blocks, and one shuffle per k-block hands
// them out. The next 32, or the next tile's first ones, load while these are in use.
#pragma once

namespace dg {

constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

class ScalesB {
 public:
  static constexpr int kLanes = 32;
  static constexpr int kColumns = kLayout.warpgroup_n();
  // Columns between which the scale may change: tiles start at multiples of their width, so a
  // boundary of a 128-block falls only on multiples of this.
  static constexpr int kGranule = gcd(gcd(config::kBlockN, kColumns), 128);
  // Blocks of 128 that kColumns columns can touch, at the worst start.
  static constexpr int kScaleBlocks = (128 - kGranule + kColumns - 1) / 128 + 1;

  __device__ explicit ScalesB(const float* sfb) : sfb_(sfb) {}

  // Starts loading the scales of columns n... for the k-blocks that come `first + lane`-th in the
  // order of `range` from `start`.
  __device__ void prefetch(const KRange& range, int n, int first, int start, bool valid) {
    const int index = first + laneid();
    const int k_block = range.block(index, start);
#pragma unroll
    for (int i = 0; i < kScaleBlocks; ++i) {
      const int n_block = n / 128 + i;
      const bool exists = valid && index < range.count() && n_block < kRows;
      next_[i] = exists ? __ldg(sfb_ + n_block * kKBlocks + k_block) : 0.0f;
    }
  }

  // Makes the prefetched scales the current ones.
  __device__ void rotate() {
#pragma unroll
    for (int i = 0; i < kScaleBlocks; ++i) current_[i] = next_[i];
  }

  // The scales of the lane-th current k-block.
  __device__ void broadcast(float (&scales)[kScaleBlocks], int lane) const {
#pragma unroll
    for (int i = 0; i < kScaleBlocks; ++i) {
      scales[i] = __shfl_sync(0xffffffff, current_[i], lane);
    }
  }

 private:
  static constexpr int kRows = (config::kN + 127) / 128;

  const float* sfb_;
  float current_[kScaleBlocks];
  float next_[kScaleBlocks];
};

// total += (row scale x column scale) x partial, for one 64-row wave. A thread holds rows r (even
// pairs) and r + 8 (odd pairs) of every 8-column group: PTX ISA, wgmma.m64nNk32, "accumulator D".
template <int kRegisters>
__device__ __forceinline__ void promote(float (&total)[kRegisters],
                                        const float (&partial)[kRegisters], float row_scale_0,
                                        float row_scale_1,
                                        const float (&scales)[ScalesB::kScaleBlocks], int n) {
  constexpr int kGranule = ScalesB::kGranule;
  const int offset = kGranule == 128 ? 0 : n % 128;
#pragma unroll
  for (int column = 0; column < ScalesB::kColumns; column += kGranule) {
    // Whatever the offset, these columns lie in block `low` or the one after it.
    const int low = column / 128;
    float scale = scales[low];
    if (low + 1 < ScalesB::kScaleBlocks && column % 128 != 0) {
      scale = offset + column >= (low + 1) * 128 ? scales[low + 1] : scale;
    }
    const float scale_0 = row_scale_0 * scale;
    const float scale_1 = row_scale_1 * scale;
#pragma unroll
    for (int i = column / 2; i < (column + kGranule) / 2; i += 4) {
      total[i + 0] += scale_0 * partial[i + 0];
      total[i + 1] += scale_0 * partial[i + 1];
      total[i + 2] += scale_1 * partial[i + 2];
      total[i + 3] += scale_1 * partial[i + 3];
    }
  }
}

}  // namespace dg
