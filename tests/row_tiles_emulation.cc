// csrc/kernels/row_tiles.cuh on a CPU: one warp, whose lanes are fibers.
//
// Reads KernelParams' numbers (m, num_groups, num_sizes, max_m, fill_zero), how many integers
// `groups` has and they themselves, and `detail[0]`; prints the number of row tiles, of those that
// multiply, and of each its m, rows, group and kind. The kernel's
// constants are macros: GROUPING, BLOCK_M, RASTER_M.
//
// A lane runs until it exchanges a value with the others, then the next one does. So every lane has
// written before the first one goes on, and that one writes its next value elsewhere.

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define __device__
#define __forceinline__ inline

namespace dg {
namespace config {
constexpr int kGrouping = GROUPING, kBlockM = BLOCK_M, kClusterM = 1, kRasterM = RASTER_M;
}
using std::max;
using std::min;
using uint32_t = std::uint32_t;

constexpr int kLanes = 32;
ucontext_t contexts[kLanes + 1];  // the last one is main's
int lane_now = 0;
uint32_t written[2][kLanes];
int exchanges[kLanes];

inline int laneid() { return lane_now; }

// What every lane has written at its exchange of the same number.
inline const uint32_t* exchange(uint32_t value) {
  const int lane = lane_now;
  uint32_t* const all = written[exchanges[lane]++ % 2];
  all[lane] = value;
  lane_now = (lane + 1) % kLanes;
  swapcontext(&contexts[lane], &contexts[lane_now]);
  return all;
}

inline int __shfl_sync(unsigned, int value, int source) { return exchange(value)[source % kLanes]; }
inline int __shfl_up_sync(unsigned, int value, int distance) {
  const int lane = laneid();
  const uint32_t* const all = exchange(value);
  return all[lane >= distance ? lane - distance : lane];
}
inline int __reduce_add_sync(unsigned, int value) {
  const uint32_t* const all = exchange(value);
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += all[i];
  return sum;
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const uint32_t* const all = exchange(value);
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= all[i] << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline int __clz(unsigned value) { return value == 0 ? 32 : __builtin_clz(value); }
}  // namespace dg

// clang-format off: the second uses the first.
#include "../csrc/kernels/grouping.h"
#include "../csrc/kernels/row_tiles.cuh"
// clang-format on

namespace {

int Read() {
  int value = 0;
  if (std::scanf("%d", &value) != 1) std::abort();
  return value;
}

dg::KernelParams params = {};
bool done[dg::kLanes];

void Lane() {
  {
    dg::RowTiles tiles(params);
    const bool prints = dg::laneid() == 0;
    if (prints) std::printf("%d %d\n", tiles.count(), tiles.multiply_count());
    // As the scheduler asks: tiles that multiply, and those that become zero, in swaths of each.
    const int ends[] = {0, tiles.multiply_count(), tiles.count()};
    for (int part = 0; part < 2; ++part) {
      for (int t = ends[part]; t < ends[part + 1]; ++t) {
        const int index = (t - ends[part]) % RASTER_M;
        const dg::RowTile tile = tiles.get(t - index, index);
        if (prints) {
          std::printf("%d %d %d %d\n", tile.m, tile.rows, tile.group, tile.kind);
        }
      }
    }
  }
  // The others end, too, before the program does.
  const int lane = dg::lane_now;
  done[lane] = true;
  dg::lane_now = (lane + 1) % dg::kLanes;
  swapcontext(&dg::contexts[lane],
              &dg::contexts[lane + 1 == dg::kLanes ? dg::kLanes : dg::lane_now]);
}

}  // namespace

int main() {
  params.m = Read();
  params.num_groups = Read();
  params.num_sizes = Read();
  params.max_m = Read();
  params.fill_zero = Read();
  std::vector<int> groups(Read());
  for (int& value : groups) value = Read();
  const int detail = Read();
  params.groups = groups.data();
  params.detail = &detail;
  constexpr std::size_t kStack = 1 << 18;
  std::vector<char> stacks(dg::kLanes * kStack);
  for (int i = 0; i < dg::kLanes; ++i) {
    getcontext(&dg::contexts[i]);
    dg::contexts[i].uc_stack.ss_sp = stacks.data() + i * kStack;
    dg::contexts[i].uc_stack.ss_size = kStack;
    dg::contexts[i].uc_link = &dg::contexts[dg::kLanes];
    makecontext(&dg::contexts[i], Lane, 0);
  }
  swapcontext(&dg::contexts[dg::kLanes], &dg::contexts[0]);
  return std::all_of(done, done + dg::kLanes, [](bool value) { return value; }) ? 0 : 1;
}
