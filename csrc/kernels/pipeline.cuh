// The tile's geometry, and the ring of shared-memory stages between the producers and the math
// warpgroups.
//
// Each stage has two mbarriers. `full`: the operand warp announces the bytes of A and B (1 arrival)
// and TMA delivers them; the scale warp arrives with B's scales, which are too few for TMA, after
// it has announced the bytes of A's, or with 32 lanes that copied those 4 bytes at a time. `empty`:
// every math warp arrives once it no longer reads the stage; with multicast it arrives in each CTA
// of the cluster, because the peer's loads write here too.
#pragma once

namespace dg {

constexpr SmemLayout kLayout = {config::kBlockM, config::kBlockN, config::kNumStages,
                                config::kMathWarpgroups, config::kClusterK};
constexpr int kWaves = kLayout.waves();
constexpr int kAccumulators = kLayout.warpgroup_n() / 2;  // registers of one wave, per thread
constexpr int kMulticast = config::kClusterM * config::kClusterN;  // CTAs that share a stage

// A position in the ring; both sides step through it in the same order.
class RingPosition {
 public:
  __device__ int stage() const { return stage_; }
  // Parity of the phase in which this stage becomes full on this pass; the slot is free for this
  // pass once the phase before it (parity ^ 1) of `empty` has completed.
  __device__ uint32_t parity() const { return parity_; }

  __device__ void advance() {
    if (++stage_ == config::kNumStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
    // Where the program says, not where ptxas sinks it: into the gap between two wgmmas.
    asm volatile("" : "+r"(stage_), "+r"(parity_));
  }

  __device__ void advance(int stages) {
    const int next = stage_ + stages;
    stage_ = next % config::kNumStages;
    parity_ ^= next / config::kNumStages % 2;
  }

 private:
  int stage_ = 0;
  uint32_t parity_ = 0;
};

// Where the next tile's description lies: the operand warp writes it, the math warps read it once
// the tile's first stage is full. There is one slot more than stages. Every tile takes a stage at
// least, so when the operand warp comes to a slot again, it has waited for a stage that the math
// warps gave back after they had read what is in the slot.
class TileSlot {
 public:
  __device__ int next() {
    const int slot = slot_;
    slot_ = slot == config::kNumStages ? 0 : slot + 1;
    return slot;
  }

 private:
  int slot_ = 0;
};

// Shared-memory addresses, from the dynamic window's base and the common layout.
struct Smem {
  uint32_t base;

  __device__ uint32_t a(int stage) const {
    return base + kLayout.a_offset() + stage * kLayout.a_bytes();
  }
  __device__ uint32_t b(int stage) const {
    return base + kLayout.b_offset() + stage * kLayout.b_bytes();
  }
  __device__ uint32_t sfa(int stage) const {
    return base + kLayout.sfa_offset() + stage * kLayout.sfa_bytes();
  }
  __device__ uint32_t sfb(int stage) const {
    return base + kLayout.sfb_offset() + stage * kLayout.sfb_bytes();
  }
  __device__ uint32_t tile(int slot) const { return base + kLayout.tile_offset() + 16 * slot; }
  __device__ uint32_t d(int warpgroup, int wave) const {
    return base + kLayout.d_offset() + (warpgroup * kLayout.waves() + wave) * kLayout.d_bytes();
  }
  __device__ uint32_t partials(int warpgroup) const {
    return base + kLayout.partial_offset() +
           warpgroup * (config::kClusterK - 1) * kLayout.partial_bytes();
  }
  __device__ uint32_t full(int stage) const { return barrier(stage); }
  __device__ uint32_t empty(int stage) const { return barrier(config::kNumStages + stage); }
  __device__ uint32_t exchange(int math_warp) const {
    return barrier(2 * config::kNumStages + math_warp);
  }
  __device__ uint32_t tile_count() const { return base + kLayout.tile_count_offset(); }

 private:
  __device__ uint32_t barrier(int index) const {
    return base + kLayout.barrier_offset() + 8 * index;
  }
};

}  // namespace dg
