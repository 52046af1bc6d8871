// Split-k: the CTAs of a cluster multiply the same tile over different parts of k and add their
// float32 partial sums through distributed shared memory.
//
// Rows are shared out: CTA r of kClusterK finishes and stores rows [r, r + 1) x 64 / kClusterK of
// each wave, which is a whole number of warps. Every warp pushes its accumulators into the owner
// CTA's buffer (st.async; the bytes count on the owner's `partials_full`), and the owner adds them
// in rank order, so the result does not depend on who came first. An atomic add would.
#pragma once

namespace dg {

class SplitK {
 public:
  static constexpr int kRanks = config::kClusterK;
  static constexpr int kWarpsPerRank = 4 / kRanks;

  __device__ SplitK(const Smem& smem, int warpgroup, int warp)
      : full_(smem.partials_full(warpgroup)),
        empty_(smem.partials_empty(warpgroup)),
        buffer_(smem.partial(warpgroup, 0)),
        rank_(cluster_ctarank()),
        warp_(warp) {}

  // Whether this warp holds rows that this CTA stores, and where they begin in its slice.
  __device__ bool owns() const { return warp_ / kWarpsPerRank == rank_; }
  __device__ int row() const { return warp_ % kWarpsPerRank * 16; }
  __device__ int first_row() const { return rank_ * kLayout.store_rows(); }

  // Barriers' arrivals per phase.
  static constexpr int kFullArrivals = 1;
  static constexpr int kEmptyArrivals = (kRanks - 1) * kWarpsPerRank;

  // Exchanges partial sums; afterwards the owning warps' `total` is the sum over the cluster.
  __device__ void reduce(float (&total)[kAccumulators]) {
    constexpr uint32_t kBytes = (kRanks - 1) * kLayout.partial_bytes();
    if (!joined_) {
      barrier_cluster_wait();  // the peers' barriers exist
      joined_ = true;
    }
    if (threadIdx.x % kWarpgroupThreads == 0) mbarrier_arrive_expect_tx(full_, kBytes);
    if (!owns()) {
      mbarrier_wait(empty_, parity_ ^ 1);
      send(total);
    } else {
      mbarrier_wait_cluster(full_, parity_);
      receive(total);
    }
    parity_ ^= 1;
  }

  // Tells the senders that the slots of the last tile, if there was one, are free: its sums were
  // read before the warps met in the epilogue. Only where another tile begins: after the last one
  // peers may have left, and nothing is sent that they do not wait for.
  __device__ void release() const {
    const int lane = threadIdx.x % 32;
    if (joined_ && owns() && lane < kRanks && lane != rank_) {
      mbarrier_arrive_remote(mapa(empty_, lane));
    }
  }

 private:
  static constexpr int kWarpBytes = kAccumulators * 32 * 4;
  static constexpr int kSlotBytes = kWarpsPerRank * kWarpBytes;

  // Four registers of all lanes lie side by side: 16-byte accesses without bank conflicts.
  __device__ uint32_t address(int slot, int quad) const {
    return buffer_ + slot * kSlotBytes + warp_ % kWarpsPerRank * kWarpBytes + quad * 512 +
           threadIdx.x % 32 * 16;
  }

  __device__ void send(const float (&total)[kAccumulators]) const {
    const int owner = warp_ / kWarpsPerRank;
    const int slot = rank_ < owner ? rank_ : rank_ - 1;  // the owner has no slot
    const uint32_t remote_full = mapa(full_, owner);
    const uint32_t remote = mapa(address(slot, 0), owner);
#pragma unroll
    for (int quad = 0; quad < kAccumulators / 4; ++quad) {
      const float* v = total + 4 * quad;
      st_async_v4(remote + quad * 512, v[0], v[1], v[2], v[3], remote_full);
    }
  }

  __device__ void receive(float (&total)[kAccumulators]) const {
#pragma unroll
    for (int quad = 0; quad < kAccumulators / 4; ++quad) {
      float4 own = {total[4 * quad], total[4 * quad + 1], total[4 * quad + 2], total[4 * quad + 3]};
      float4 sum = {};
#pragma unroll
      for (int rank = 0; rank < kRanks; ++rank) {
        const float4 part =
            rank == rank_ ? own : ld_shared_v4(address(rank < rank_ ? rank : rank - 1, quad));
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      total[4 * quad] = sum.x;
      total[4 * quad + 1] = sum.y;
      total[4 * quad + 2] = sum.z;
      total[4 * quad + 3] = sum.w;
    }
  }

  uint32_t full_;
  uint32_t empty_;
  uint32_t buffer_;
  int rank_;
  int warp_;
  uint32_t parity_ = 0;
  bool joined_ = false;
};

}  // namespace dg
