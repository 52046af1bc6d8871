// From float32 accumulators to bf16 in global memory: registers -> stmatrix -> swizzled shared
// memory -> TMA store, asynchronous until the staging buffer is needed again a tile later. Each
// math warpgroup does this on its own, so that one can multiply while the other stores.
#pragma once

namespace dg {

// One warpgroup's staging buffers, one per wave.
class Epilogue {
 public:
  __device__ Epilogue(const Smem& smem, const TensorMap& map_d, int warpgroup)
      : map_d_(map_d), staging_(smem.d(warpgroup, 0)), barrier_(1 + warpgroup) {}

  // Stores one wave, whose first row and column in D are m and n. `writes` says whether this warp
  // holds rows of it, `row` which row of a box its first one is.
  __device__ void store(const float (&total)[kAccumulators], int wave, int m, int n, bool writes,
                        int row) const {
    const uint32_t staging = staging_ + wave * kLayout.d_bytes();
    const bool leader = threadIdx.x % kWarpgroupThreads == 0;
    // The wave stored last from this buffer is kWaves stores ago.
    if (leader) cp_async_bulk_wait_group_read<kWaves - 1>();
    sync();
    if (writes) {
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        to_shared(staging + box * kBoxBytes, total + box * kBoxColumns / 2, row);
      }
    }
    fence_proxy_async_shared();
    sync();
    if (leader) {
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        tma_store_2d(map_d_, staging + box * kBoxBytes, n + box * kBoxColumns, m);
      }
      cp_async_bulk_commit_group();
    }
  }

  // Shared memory must outlive the reads of the last stores.
  __device__ void finish() const { cp_async_bulk_wait_group_read<0>(); }

 private:
  static constexpr int kBoxColumns = kLayout.store_cols();
  static constexpr int kBoxes = kLayout.warpgroup_n() / kBoxColumns;
  static constexpr int kPitch = kBoxColumns * 2;  // bytes of one row of a box
  static constexpr int kBoxBytes = kPitch * kLayout.store_rows();
  static constexpr int kChunks = kPitch / 16;  // 16-byte chunks (8 columns) of one row

  // Warpgroups meet at barriers of their own; 0 is the CTA's.
  __device__ void sync() const { barrier_sync(barrier_, kWarpgroupThreads); }

  // Address of a row's 16-byte chunk. TMA's swizzle exchanges the chunks of a row by XOR with
  // address bits from 7 up (PTX ISA, "Swizzling modes"), so that the eight rows of an 8x8 matrix
  // hit all banks.
  __device__ static uint32_t chunk(uint32_t box, int row, int index) {
    return box + row * kPitch + (index ^ (row * kPitch / 128 % kChunks)) * 16;
  }

  // A warp's 16 rows of a box. stmatrix takes matrices 0 and 1 (rows 0-7 and 8-15 of one 8-column
  // group) from registers 4j..4j+3 as they lie in the accumulator, 2 and 3 from the next group.
  __device__ static void to_shared(uint32_t box, const float* total, int row) {
    const int lane = threadIdx.x % 32;
    const int lane_row = row + lane % 16;
    if constexpr (kChunks == 1) {
      stmatrix_x2(chunk(box, lane_row, 0), cvt_bf16x2(total[0], total[1]),
                  cvt_bf16x2(total[2], total[3]));
    } else {
#pragma unroll
      for (int group = 0; group < kChunks; group += 2) {
        const float* v = total + 4 * group;
        stmatrix_x4(chunk(box, lane_row, group + lane / 16), cvt_bf16x2(v[0], v[1]),
                    cvt_bf16x2(v[2], v[3]), cvt_bf16x2(v[4], v[5]), cvt_bf16x2(v[6], v[7]));
      }
    }
  }

  const TensorMap& map_d_;
  const uint32_t staging_;
  const int barrier_;
};

}  // namespace dg
