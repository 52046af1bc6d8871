// Split-k: the CTAs of a cluster multiply the same tile over different parts of k and add their
// float32 partial sums through distributed shared memory.
//
// Rows are shared out: CTA r of kClusterK finishes and stores the rows of the r-th share of each
// warpgroup's warps. Every warp pushes its accumulators into the buffer of its namesake in the
// owner CTA (st.async), which adds them in rank order, so the result does not depend on who came
// first. An atomic add would.
//
// A warp has one barrier in each CTA: in the owner's, the sums' bytes arrive on it; in the others',
// the owner says that it has read the last ones.
#pragma once

namespace dg {

// One warp's part in it.
class SplitK {
 public:
  static constexpr int kArrivals = 1;  // per phase of every barrier, beside bytes

  __device__ SplitK(const Smem& smem, int warpgroup, int warp)
      : barrier_(smem.exchange(4 * warpgroup + warp)),
        buffer_(smem.partials(warpgroup) +
                warp % kLayout.store_warps() * (kRanks - 1) * kWarpBytes),
        rank_(cluster_ctarank()),
        owner_(warp / kLayout.store_warps()),
        row_(warp % kLayout.store_warps() * 16) {}

  // Whether this CTA stores the warp's rows; the first of all that it stores, and there the warp's.
  __device__ bool owns() const { return owner_ == rank_; }
  __device__ int first_row() const { return rank_ * kLayout.store_rows(); }
  __device__ int row() const { return row_; }

  // Exchanges partial sums; afterwards the owner's `total` is the sum over the cluster.
  __device__ void reduce(float (&total)[kAccumulators]) {
    if (owns()) {
      if (elect_sync()) {
        mbarrier_arrive_expect_tx(barrier_, (kRanks - 1) * kWarpBytes);
      }
      mbarrier_wait_cluster(barrier_, parity_);
      receive(total);
    } else {
      mbarrier_wait(barrier_, parity_ ^ 1);
      send(total);
    }
    parity_ ^= 1;
  }

  // Tells the senders that the last tile's sums have been read. Only where another exchange
  // follows: after the last one peers may have left, and nothing is sent that they do not wait for.
  __device__ void release() const {
    const int lane = threadIdx.x % 32;
    if (owns() && lane < kRanks && lane != rank_) {
      mbarrier_arrive_remote(mapa(barrier_, lane));
    }
  }

 private:
  static constexpr int kRanks = config::kClusterK;
  static constexpr int kWarpBytes = kAccumulators * 32 * 4;  // partial sums of 16 rows

  // The sums of one peer. Four registers of all lanes lie side by side: 16-byte accesses without
  // bank conflicts.
  __device__ uint32_t address(int slot, int quad) const {
    return buffer_ + slot * kWarpBytes + quad * 512 + threadIdx.x % 32 * 16;
  }

  __device__ void send(const float (&total)[kAccumulators]) const {
    const int slot = rank_ < owner_ ? rank_ : rank_ - 1;  // the owner has none
    const uint32_t remote_barrier = mapa(barrier_, owner_);
    const uint32_t remote = mapa(address(slot, 0), owner_);
#pragma unroll
    for (int quad = 0; quad < kAccumulators / 4; ++quad) {
      const float* v = total + 4 * quad;
      st_async_v4(remote + quad * 512, v[0], v[1], v[2], v[3], remote_barrier);
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

  const uint32_t barrier_;
  const uint32_t buffer_;  // [kRanks - 1] x kWarpBytes
  const int rank_;
  const int owner_;
  const int row_;
  uint32_t parity_ = 0;
};

}  // namespace dg
