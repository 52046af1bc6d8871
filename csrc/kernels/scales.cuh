// Promotion: the tensor cores' sum over one k-block, times its two scales, joins the float32 total.
#pragma once

namespace dg {

constexpr int kWarpgroupColumns = kLayout.warpgroup_n();
constexpr int kScaleGranule = kLayout.scale_granule(kWarpgroupColumns);
constexpr int kScaleBlocks = kLayout.scale_blocks(kWarpgroupColumns);
constexpr int kTileScaleBlocks = kLayout.scale_blocks(config::kBlockN);
constexpr int kNBlocks = (config::kN + 127) / 128;

static_assert(kTileScaleBlocks <= 4 && kScaleBlocks <= 4, "a stage holds four scales of B");

// What one wave's partial sums of one k-block are multiplied with: SFA of this thread's row (r for
// even pairs of registers, r + 8 for odd ones) times SFB of each block that its columns can touch.
struct Scales {
  float row_0[kScaleBlocks];
  float row_1[kScaleBlocks];
};

// total += scale x partial, for one 64-row wave whose first column is `offset` columns into a block
// of 128. A thread holds rows r (even pairs) and r + 8 (odd pairs) of every 8-column group: PTX
// ISA, wgmma.m64nNk32, "accumulator D".
__device__ __forceinline__ void promote(float (&total)[kAccumulators],
                                        const float (&partial)[kAccumulators], const Scales& scales,
                                        int offset) {
#pragma unroll
  for (int column = 0; column < kWarpgroupColumns; column += kScaleGranule) {
    // Whatever the offset, these columns lie in block `low` or the one after it.
    const int low = column / 128;
    float scale_0 = scales.row_0[low];
    float scale_1 = scales.row_1[low];
    if (low + 1 < kScaleBlocks && column % 128 != 0) {
      const bool next = offset + column >= (low + 1) * 128;
      scale_0 = next ? scales.row_0[low + 1] : scale_0;
      scale_1 = next ? scales.row_1[low + 1] : scale_1;
    }
#pragma unroll
    for (int i = column / 2; i < (column + kScaleGranule) / 2; i += 4) {
      total[i + 0] += scale_0 * partial[i + 0];
      total[i + 1] += scale_0 * partial[i + 1];
      total[i + 2] += scale_1 * partial[i + 2];
      total[i + 3] += scale_1 * partial[i + 3];
    }
  }
}

}  // namespace dg
