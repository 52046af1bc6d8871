// From float32 accumulators to bf16 in global memory: registers -> stmatrix -> swizzled shared
// memory -> TMA store, asynchronous until the staging buffer is needed again a tile later. Each
// math warpgroup does this on its own, so that one can multiply while the other stores.
//
// TMA stores whole boxes and clips only where D ends. Where a group's rows end inside a box, each
// warp copies its own rows out of shared memory instead.
#pragma once

namespace dg {

// The named barrier of the first math warpgroup; the others' follow.
constexpr int kEpilogueBarrier = 1;

// One warpgroup's staging buffers, one per wave.
class Epilogue {
 public:
  __device__ Epilogue(const Smem& smem, const TensorMap& map_d, void* d, int warpgroup)
      : map_d_(map_d),
        d_(d),
        staging_(smem.d(warpgroup, 0)),
        barrier_(kEpilogueBarrier + warpgroup) {}

  // Stores all waves. The first one's first row and column in D are m and n; D takes `rows` rows
  // from there. `writes` says whether this warp holds rows of it, `row` which row of a box its
  // first one is.
  __device__ __forceinline__ void store(const float (&total)[kWaves][kAccumulators], int m, int n,
                                        int rows, bool writes, int row) const {
    // The last tile's stores have read the buffers.
    if (leader()) cp_async_bulk_wait_group_read<0>();
    sync();
    // NOTE: no loop over waves: the compiler gives up unrolling so long a body, and `total`,
    // indexed at run time, would lie in local memory.
    if (writes) {
      fill<0>(total[0], m, n, rows, row);
      if constexpr (kWaves == 2) fill<1>(total[1], m, n, rows, row);
    }
    if (!whole(rows)) return;  // not one wave
    fence_proxy_async_shared();
    sync();
    if (leader()) {
      for (int wave = 0; wave < kWaves && whole(rows - wave * kWgmmaM); ++wave) {
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          tma_store_2d(map_d_, staging_ + (wave * kBoxes + box) * kBoxBytes, n + box * kBoxColumns,
                       m + wave * kWgmmaM);
        }
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

  // Warpgroups meet at barriers of their own.
  __device__ void sync() const { barrier_sync(barrier_, kWarpgroupThreads); }

  // Address of a row's 16-byte chunk. TMA's swizzle exchanges the chunks of a row by XOR with
  // address bits from 7 up (PTX ISA, "Swizzling modes"), so that the eight rows of an 8x8 matrix
  // hit all banks.
  __device__ static uint32_t chunk(uint32_t box, int row, int index) {
    return box + row * kPitch + (index ^ (row * kPitch / 128 % kChunks)) * 16;
  }

  __device__ static bool leader() { return threadIdx.x % kWarpgroupThreads == 0; }

  // Whether TMA stores a wave of which D takes so many rows; it clips them if D ends there.
  __device__ static bool whole(int rows) {
    return kRowsEndInTiles ? rows >= kLayout.store_rows() : rows > 0;
  }

  // A wave's rows of this warp: to shared memory, and from there to D if TMA is not to do it.
  template <int kWave>
  __device__ __forceinline__ void fill(const float (&total)[kAccumulators], int m, int n, int rows,
                                       int row) const {
    const int wave_rows = rows - kWave * kWgmmaM;
    if (wave_rows <= 0) return;
    const uint32_t staging = staging_ + kWave * kLayout.d_bytes();
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      to_shared(staging + box * kBoxBytes, total + box * kBoxColumns / 2, row);
    }
    if (!whole(wave_rows)) copy_rows(staging, m + kWave * kWgmmaM, n, wave_rows, row);
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

  // Copies those of a warp's 16 rows that are below `rows` to D, in 16-byte chunks, neighbours side
  // by side. A chunk is in D or past its last column as a whole: n is a multiple of 8.
  __device__ void copy_rows(uint32_t staging, int m, int n, int rows, int row) const {
    constexpr int kRowChunks = kBoxes * kChunks;
    __syncwarp();  // the warp's rows are in shared memory
    const int chunks = min(rows - row, 16) * kRowChunks;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < chunks; i += 32) {
      const int from_row = row + i / kRowChunks;
      const int in_row = i % kRowChunks;
      const int column = n + in_row * 8;
      const uint32_t source =
          chunk(staging + in_row / kChunks * kBoxBytes, from_row, in_row % kChunks);
      if (column < config::kN) {
        const size_t element = size_t(m + from_row) * config::kN + column;
        st_global_v4_s32(static_cast<char*>(d_) + 2 * element, ld_shared_v4_s32(source));
      }
    }
  }

  const TensorMap& map_d_;
  void* const d_;
  const uint32_t staging_;
  const int barrier_;
};

}  // namespace dg
