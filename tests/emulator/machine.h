// A model of what csrc/kernels/*.cuh asks of a Hopper GPU, on which the unmodified kernels run on a
// CPU: to see whether their barriers order what they must, however long anything takes.
//
// Every thread of a cluster is a fiber; which one runs next is drawn at random, some may be
// starved. What the hardware does asynchronously completes at a random time and in a random order.
// What may not be read yet, or no more, is NaN: shared memory at the start, a copy's target from
// the moment that it is issued, a wgmma's accumulators until it has completed.
//
// Modelled:
//   mbarrier     arrivals, bytes, parity waits; operations on one that does not exist, arrivals in
//                excess, and copies that complete in another phase than they were issued in, are
//                errors
//   copies       TMA loads (boxes, swizzle, clipping, multicast) and stores, cp.async
//                and its arrival, st.async, remote arrivals; into CTAs that have ended, or outside
//                the arrays, they are errors
//   wgmma        groups that complete at any time between commit_group and the wait_group<N> that
//                waits for them; only then do they read shared memory
//   barriers     of warps (shuffles, elect.sync, __syncwarp), named ones, those of clusters; lanes
//                do not stay together on their own, as PTX does not promise it either
//   the end      deadlocks, bytes that nobody waited for, wgmma or stores that outlive their thread
//
// Not modelled: memory ordering between threads (every write is seen at once) and between proxies
// (fences do nothing), so a missing fence goes unnoticed; how tensor cores round and the layout
// behind a matrix descriptor other than the one in use; TMA's descriptors in memory, its caches and
// its limits; registers (setmaxnreg), bank conflicts, time. Those are for a GPU to show.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "csrc/kernels/grouping.h"
#include "tests/emulator/ptx.cuh"

namespace emulator {

// A row-major matrix in global memory and the box of it that one TMA instruction moves.
struct TensorMap {
  char* base;
  int element_bytes;
  int64_t row_bytes;
  int64_t rows;
  int64_t pitch;  // bytes from one row to the next
  int box_row_bytes;
  int box_rows;
  int swizzle;  // 128, 64, 32, or 0 for none
};

// Global memory that the kernel reaches by instruction; the rest it reads as any program does.
struct Range {
  const char* begin;
  int64_t bytes;
};

// What the hardware is free to do, as it is to be in one launch.
struct Timing {
  enum Wgmma { kAtCommit, kAtWait, kBetween, kAny };                // when groups complete
  enum Starved { kNobody, kSomeThreads, kWarp, kCta, kFollowers };  // kFollowers: all lanes but one

  Wgmma wgmma;
  Starved starved;
  int completions;  // of 1000 steps, how many complete an asynchronous operation beside
};

struct Launch {
  TensorMap a[2];
  TensorMap b;
  TensorMap map_sfa;
  TensorMap d;
  dg::KernelParams params;
  Range sfa;
  Range sfb;
  int grid;
  int cluster_size;
  Timing timing;
};

// Runs a launch, one cluster after the other, and returns how often each element of D was written.
std::vector<uint8_t> Run(const Launch& launch, std::mt19937_64& rng);

// Says what is wrong, with `problem` in front, and exits with status 1.
[[noreturn, gnu::format(printf, 1, 2)]] void Fail(const char* format, ...);

// What is being computed, for messages.
extern const char* problem;

}  // namespace emulator
