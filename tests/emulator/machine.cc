// _longjmp from one stack to another is what the checked version of it forbids.
#undef _FORTIFY_SOURCE

#include "tests/emulator/machine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>

#include "tests/emulator/kernel.h"

namespace emulator {

const char* problem = "";

namespace {

// --- State ---------------------------------------------------------------------------------------

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 1 << 16;
constexpr uint8_t kPoison = 0xff;  // NaN as fp8, bf16 and float32, and a bad count

// An address in shared memory: the CTA's rank in the upper byte, and below it an offset that begins
// after the 1 KiB that the system keeps.
constexpr int kRankShift = 24;
constexpr uint32_t kOffsetMask = (1u << kRankShift) - 1;
constexpr uint32_t kFirstOffset = 1024;

struct Thread;
using Threads = std::vector<Thread*>;

struct Mbarrier {
  int arrivals;  // per phase
  int pending;
  int64_t bytes = 0;  // announced less arrived; copies may be ahead of the announcement
  int64_t phase = 0;
  Threads waiting;
};

struct NamedBarrier {
  int threads = 0;
  int arrived = 0;
  Threads waiting;
};

// What the lanes of a warp do together. Lanes that are ahead write the next operation's values
// while others have yet to read the last one's.
struct Warp {
  const char* operation = nullptr;
  int arrived = 0;
  uint32_t values[2][kLanes];
  Threads waiting;
};

struct Wgmma {
  float* d;
  int n;
  uint64_t a;
  uint64_t b;
  bool accumulates;
};

struct WgmmaGroup {
  std::vector<Wgmma> instructions;
  bool done = false;
};

struct Cta;

struct Thread {
  jmp_buf context;
  ucontext_t start;
  bool started = false;
  bool done = false;
  bool starved = false;
  Cta* cta;
  unsigned index;
  int warp;
  int lane;
  unsigned collectives = 0;      // warp operations so far
  int64_t cluster_arrivals = 0;  // at the cluster's barrier
  int64_t cp_asyncs = 0;         // issued, their arrivals included
  std::set<int64_t> cp_pending;  // those that have not completed
  int remote_arrivals = 0;       // under way
  int stores = 0;                // that still read shared memory
  bool waits_for_stores = false;
  std::vector<Wgmma> wgmmas;                       // not committed
  std::deque<std::shared_ptr<WgmmaGroup>> groups;  // not waited for
};

struct Cta {
  unsigned rank;
  unsigned block;
  int running;
  char* smem;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unordered_map<uint32_t, Mbarrier> mbarriers;
  std::map<int, NamedBarrier> named_barriers;
};

struct Operation {
  std::function<void()> complete;
  std::function<bool()> ready;  // may be empty: always
};

const Launch* launch;
std::mt19937_64* random_bits;
std::vector<uint8_t>* written;  // how often, per element of D

std::vector<std::unique_ptr<Cta>> cluster;
Threads runnable;
std::vector<Operation> operations;
int64_t cluster_phase;
size_t cluster_arrived;
Threads cluster_waiting;

Thread* current;  // null while the scheduler runs
jmp_buf scheduler;

unsigned Random(size_t n) { return (*random_bits)() % n; }

#define CHECK(condition, ...)            \
  do {                                   \
    if (!(condition)) Fail(__VA_ARGS__); \
  } while (false)

// --- Fibers --------------------------------------------------------------------------------------

// Back to the scheduler; whoever makes the thread runnable again resumes it here. Neither function
// is inlined: setjmp returns twice, which no caller's variables have to survive.
[[gnu::noinline]] void Block() {
  Thread* const thread = current;
  if (_setjmp(thread->context) == 0) _longjmp(scheduler, 1);
}

[[gnu::noinline]] void Resume(Thread* thread) {
  current = thread;
  if (_setjmp(scheduler) == 0) {
    if (current->started) _longjmp(current->context, 1);
    current->started = true;
    setcontext(&current->start);
  }
  current = nullptr;
}

void WaitIn(Threads& waiting) {
  waiting.push_back(current);
  Block();
}

void WakeAll(Threads& waiting) {
  runnable.insert(runnable.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

void Yield() { WaitIn(runnable); }

// Where a thread does not have to wait, it may be slow all the same.
void MaybeYield() {
  if (Random(64) == 0) Yield();
}

void Start(std::function<void()> complete, std::function<bool()> ready = nullptr) {
  operations.push_back({std::move(complete), std::move(ready)});
  MaybeYield();
}

// Completes one of the asynchronous operations that may complete, if there is one.
bool CompleteOne() {
  const size_t count = operations.size();
  const size_t first = count == 0 ? 0 : Random(count);
  for (size_t i = 0; i < count; ++i) {
    Operation& operation = operations[(first + i) % count];
    if (operation.ready && !operation.ready()) continue;
    const std::function<void()> complete = std::move(operation.complete);
    operation = std::move(operations.back());
    operations.pop_back();
    complete();
    return true;
  }
  return false;
}

// Lets one thread run until it blocks. Starved ones run when nothing else can happen, or seldom.
void Step() {
  const size_t count = runnable.size();
  size_t chosen = Random(count);
  if (runnable[chosen]->starved && Random(200) != 0) {
    size_t other = 0;
    while (other < count && runnable[(chosen + other) % count]->starved) ++other;
    if (other == count && CompleteOne()) return;
    chosen = (chosen + other) % count;
  }
  Thread* const thread = runnable[chosen];
  runnable[chosen] = runnable.back();
  runnable.pop_back();
  Resume(thread);
}

void RunCurrent() {
  dg::TensorMap maps[5];
  const TensorMap* const modelled[] = {&launch->a[0], &launch->a[1], &launch->b, &launch->map_sfa,
                                       &launch->d};
  for (int i = 0; i < 5; ++i) std::memcpy(maps[i].bytes, &modelled[i], sizeof modelled[i]);
  RunThread(maps, maps[2], maps[3], maps[4], launch->params);
  CHECK(current->wgmmas.empty() && current->groups.empty(), "a wgmma outlives its thread");
  CHECK(current->stores == 0, "a store outlives its thread");
  current->done = true;
  --current->cta->running;
  Block();
}

// --- Shared memory -------------------------------------------------------------------------------

Cta& CtaOf(uint32_t address) {
  CHECK(address >> kRankShift < cluster.size(), "address %#x is of no CTA", address);
  return *cluster[address >> kRankShift];
}

uint32_t AtRank(uint32_t address, unsigned rank) {
  return (address & kOffsetMask) | rank << kRankShift;
}

// What an instruction reads or writes, which must be aligned.
char* Shared(uint32_t address, uint32_t bytes, uint32_t alignment) {
  const uint32_t offset = address & kOffsetMask;
  CHECK(offset % alignment == 0, "address %#x is not a multiple of %u", address, alignment);
  CHECK(offset >= kFirstOffset && offset + bytes <= kFirstOffset + kKernel.smem_bytes,
        "address %#x is not in shared memory", address);
  return CtaOf(address).smem + offset;
}

// The same in the thread's own CTA.
char* Own(uint32_t address, uint32_t bytes, uint32_t alignment) {
  CHECK(address >> kRankShift == current->cta->rank, "address %#x is another CTA's", address);
  return Shared(address, bytes, alignment);
}

template <typename T>
T Load(uint32_t address) {
  T value;
  std::memcpy(&value, Own(address, sizeof value, sizeof value), sizeof value);
  return value;
}

template <typename T>
void Store(uint32_t address, const T& value) {
  std::memcpy(Own(address, sizeof value, sizeof value), &value, sizeof value);
}

void CheckRunning(uint32_t address, const char* what) {
  CHECK(CtaOf(address).running > 0, "%s reaches a CTA that has ended", what);
}

// TMA exchanges 16-byte chunks by XOR with address bits from 7 up.
uint32_t Swizzled(uint32_t offset, int swizzle) {
  const uint32_t mask = swizzle == 0 ? 0 : swizzle / 16 - 1;
  return offset ^ ((offset >> 7 & mask) << 4);
}

// --- mbarriers -----------------------------------------------------------------------------------

Mbarrier& MbarrierAt(uint32_t address) {
  auto& all = CtaOf(address).mbarriers;
  const auto found = all.find(address & kOffsetMask);
  CHECK(found != all.end(), "there is no mbarrier at %#x yet", address);
  return found->second;
}

Mbarrier& OwnMbarrier(uint32_t address) {
  Own(address, 8, 8);
  return MbarrierAt(address);
}

void EndPhaseIfComplete(Mbarrier& barrier) {
  CHECK(std::abs(barrier.bytes) < 1 << 20, "more bytes than an mbarrier counts");
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  WakeAll(barrier.waiting);
}

void Arrive(Mbarrier& barrier) {
  CHECK(barrier.pending > 0, "more arrivals than the mbarrier expects");
  --barrier.pending;
  EndPhaseIfComplete(barrier);
}

// What an asynchronous operation does to a barrier once it has completed.
class Signal {
 public:
  Signal(uint32_t barrier, const char* what)
      : barrier_(barrier), what_(what), phase_(MbarrierAt(barrier).phase) {}

  void Bytes(int64_t count) const {
    Mbarrier& barrier = Check();
    barrier.bytes -= count;
    EndPhaseIfComplete(barrier);
  }
  void Arrival() const { Arrive(Check()); }

 private:
  Mbarrier& Check() const {
    CheckRunning(barrier_, what_);
    Mbarrier& barrier = MbarrierAt(barrier_);
    CHECK(barrier.phase == phase_, "%s completes in a later phase of its mbarrier", what_);
    return barrier;
  }

  uint32_t barrier_;
  const char* what_;
  int64_t phase_;
};

bool HasCompleted(const Mbarrier& barrier, uint32_t parity) {
  return (barrier.phase & 1) != parity;
}

// --- Other barriers ------------------------------------------------------------------------------

// Each lane's value, once all lanes are here.
const uint32_t* Together(const char* operation, uint32_t value = 0) {
  Thread* const thread = current;
  Warp& warp = thread->cta->warps[thread->warp];
  if (warp.arrived == 0) warp.operation = operation;
  CHECK(std::strcmp(warp.operation, operation) == 0, "lanes of a warp at %s and at %s",
        warp.operation, operation);
  uint32_t* const values = warp.values[thread->collectives++ % 2];
  values[thread->lane] = value;
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    WakeAll(warp.waiting);
    Yield();
  } else {
    WaitIn(warp.waiting);
  }
  return values;
}

void ArriveAtNamedBarrier(int id, int threads, bool waits) {
  NamedBarrier& barrier = current->cta->named_barriers[id];
  if (barrier.arrived == 0) barrier.threads = threads;
  CHECK(barrier.threads == threads, "barrier %d is of %d threads, and of %d", id, barrier.threads,
        threads);
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    WakeAll(barrier.waiting);
    if (waits) Yield();
  } else if (waits) {
    WaitIn(barrier.waiting);
  }
}

void ArriveAtCluster() {
  ++current->cluster_arrivals;
  if (++cluster_arrived < cluster.size() * kKernel.threads) return;
  cluster_arrived = 0;
  ++cluster_phase;
  WakeAll(cluster_waiting);
}

// --- Copies --------------------------------------------------------------------------------------

const TensorMap& Modelled(const dg::TensorMap& map) {
  const TensorMap* modelled;
  std::memcpy(&modelled, map.bytes, sizeof modelled);
  return *modelled;
}

// Calls `copy(offset in the box in shared memory, address in global memory or null, bytes of it)`
// for every 16-byte chunk of a box.
template <typename Copy>
void ForEachChunk(const TensorMap& map, uint32_t smem, int64_t column_bytes, int64_t row,
                  const Copy& copy) {
  const uint32_t offset = smem & kOffsetMask;
  for (int i = 0; i < map.box_rows; ++i) {
    for (int j = 0; j < map.box_row_bytes; j += 16) {
      const int64_t column = column_bytes + j;
      const bool inside = row + i < map.rows && column < map.row_bytes;
      copy(Swizzled(offset + i * map.box_row_bytes + j, map.swizzle),
           inside ? map.base + (row + i) * map.pitch + column : nullptr,
           static_cast<int>(std::min<int64_t>(16, map.row_bytes - column)));
    }
  }
}

void LoadBox(uint32_t smem, const TensorMap& map, uint32_t barrier, int64_t x, int64_t y,
             unsigned ranks) {
  const int64_t column_bytes = x * map.element_bytes;
  CHECK(x >= 0 && y >= 0, "a load begins before its matrix");
  CHECK(column_bytes % 16 == 0, "a load begins inside 16 bytes");  // an illegal instruction
  const int bytes = map.box_row_bytes * map.box_rows;
  struct Target {
    Cta* cta;
    Signal signal;
  };
  std::vector<Target> targets;
  for (unsigned rank = 0; rank < cluster.size(); ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    std::memset(Shared(AtRank(smem, rank), bytes, 128), kPoison, bytes);
    targets.push_back({cluster[rank].get(), Signal(AtRank(barrier, rank), "a TMA load")});
  }
  Start([=, &map] {
    for (const Target& target : targets) {
      ForEachChunk(map, smem, column_bytes, y, [&](uint32_t to, const char* from, int count) {
        std::memset(target.cta->smem + to, 0, 16);
        if (from != nullptr) std::memcpy(target.cta->smem + to, from, count);
      });
      target.signal.Bytes(bytes);
    }
  });
}

void WriteD(char* to, const void* from, int bytes) {
  const int64_t offset = to - launch->d.base;
  CHECK(offset >= 0 && offset + bytes <= launch->d.rows * launch->d.pitch, "a write outside D");
  std::memcpy(to, from, bytes);
  for (int i = 0; i < bytes / 2; ++i) {
    CHECK(++(*written)[offset / 2 + i] == 1, "an element of D is written twice");
  }
}

void CheckScales(const void* source, int bytes) {
  const char* const begin = static_cast<const char*>(source);
  for (const Range& range : {launch->sfa, launch->sfb}) {
    if (begin >= range.begin && begin + bytes <= range.begin + range.bytes) return;
  }
  Fail("a copy of what are not scales");
}

// --- wgmma ---------------------------------------------------------------------------------------

const std::array<float, 256> kFp8 = [] {
  std::array<float, 256> values;
  for (int i = 0; i < 256; ++i) {
    const int exponent = i >> 3 & 15, mantissa = i & 7;
    const float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                      : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    values[i] = (i & 127) == 127 ? NAN : i < 128 ? value : -value;
  }
  return values;
}();

// 32 values of row `row` of a matrix with rows of 128 bytes, swizzled.
void ReadRow(const char* smem, uint64_t descriptor, int row, float (&values)[32]) {
  // A stride of 1024 bytes between 8 rows and a swizzle of 128 bytes; see csrc/kernels/ptx.cuh.
  CHECK(descriptor >> 32 == 0x40000040, "an unknown matrix descriptor");
  const uint32_t begin = (descriptor & 0x3fff) * 16 + row * 128;
  for (int k = 0; k < 32; ++k) {
    values[k] = kFp8[static_cast<uint8_t>(smem[Swizzled(begin + k, 128)])];
  }
}

// A thread's elements of the result: two neighbours in each of two rows per 8 columns.
void Multiply(const Thread& thread, const Wgmma& wgmma) {
  const char* const smem = thread.cta->smem;
  const int first_row = thread.warp % 4 * 16 + thread.lane / 4;
  float a[2][32];
  for (int half = 0; half < 2; ++half) ReadRow(smem, wgmma.a, first_row + 8 * half, a[half]);
  for (int i = 0; i < wgmma.n / 4; ++i) {
    float b[32];
    ReadRow(smem, wgmma.b, i / 2 * 8 + thread.lane % 4 * 2 + i % 2, b);
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[half][k] * b[k];
      float& d = wgmma.d[i / 2 * 4 + half * 2 + i % 2];
      d = wgmma.accumulates ? d + sum : sum;
    }
  }
}

void Complete(const Thread& thread, WgmmaGroup& group) {
  if (group.done) return;
  group.done = true;
  for (const Wgmma& wgmma : group.instructions) Multiply(thread, wgmma);
}

// --- Clusters ------------------------------------------------------------------------------------

char* Stack(size_t index) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= index) stacks.emplace_back(new char[kStackBytes]);
  return stacks[index].get();
}

void Starve() {
  const int warp = Random(kKernel.threads / kLanes);
  const unsigned rank = Random(cluster.size());
  for (const auto& cta : cluster) {
    for (Thread& thread : cta->threads) {
      switch (launch->timing.starved) {
        case Timing::kNobody:
          break;
        case Timing::kSomeThreads:
          thread.starved = Random(8) == 0;
          break;
        case Timing::kWarp:
          thread.starved = thread.warp == warp;
          break;
        case Timing::kCta:
          thread.starved = cta->rank == rank;
          break;
        case Timing::kFollowers:
          thread.starved = thread.lane != 0;
          break;
      }
    }
  }
}

void RunCluster(int first_block) {
  static std::vector<std::unique_ptr<char[]>> smem;
  constexpr size_t kSmemBytes = 1 << 18;
  cluster_phase = 0;
  cluster_arrived = 0;
  size_t stacks = 0;
  for (int rank = 0; rank < launch->cluster_size; ++rank) {
    cluster.push_back(std::make_unique<Cta>());
    Cta& cta = *cluster.back();
    cta.rank = rank;
    cta.block = first_block + rank;
    cta.running = kKernel.threads;
    if (smem.size() < cluster.size()) smem.emplace_back(new char[kSmemBytes]);
    cta.smem = smem[rank].get();
    std::memset(cta.smem, kPoison, kSmemBytes);
    cta.warps.resize(kKernel.threads / kLanes);
    cta.threads = std::vector<Thread>(kKernel.threads);
    for (int i = 0; i < kKernel.threads; ++i) {
      Thread& thread = cta.threads[i];
      thread.cta = &cta;
      thread.index = i;
      thread.warp = i / kLanes;
      thread.lane = i % kLanes;
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = Stack(stacks++);
      thread.start.uc_stack.ss_size = kStackBytes;
      thread.start.uc_link = nullptr;
      makecontext(&thread.start, RunCurrent, 0);
      runnable.push_back(&thread);
    }
  }
  Starve();
  while (!runnable.empty() || !operations.empty()) {
    if (static_cast<int>(Random(1000)) < launch->timing.completions || runnable.empty()) {
      if (!CompleteOne() && runnable.empty()) break;
    }
    if (!runnable.empty()) Step();
  }
  for (const auto& cta : cluster) {
    for (const Thread& thread : cta->threads) {
      CHECK(thread.done, "a deadlock: CTA %u, warp %d, lane %d", cta->rank, thread.warp,
            thread.lane);
    }
    for (const auto& [address, barrier] : cta->mbarriers) {
      CHECK(barrier.bytes == 0, "bytes that the mbarrier at %#x has not seen", address);
    }
  }
  CHECK(operations.empty(), "an operation that cannot complete");
  cluster.clear();
}

}  // namespace

void Fail(const char* format, ...) {
  std::fprintf(stderr, "emulator: %s: ", problem);
  if (current != nullptr) {
    std::fprintf(stderr, "CTA %u, warp %d, lane %d: ", current->cta->rank, current->warp,
                 current->lane);
  }
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::_Exit(1);
}

std::vector<uint8_t> Run(const Launch& to_run, std::mt19937_64& rng) {
  std::vector<uint8_t> counts(to_run.d.rows * to_run.d.pitch / 2);
  launch = &to_run;
  random_bits = &rng;
  written = &counts;
  for (int block = 0; block < to_run.grid; block += to_run.cluster_size) RunCluster(block);
  return counts;
}

Index ThreadIndex() { return {current->index}; }
Index BlockIndex() { return {current->cta->block}; }
Index GridSize() { return {static_cast<unsigned>(launch->grid)}; }

}  // namespace emulator

// --- The instructions ----------------------------------------------------------------------------

namespace dg {

using namespace emulator;

bool elect_sync() {
  Together("elect.sync");
  return current->lane == 0;
}
int laneid() { return current->lane; }
uint32_t cluster_ctarank() { return current->cta->rank; }
void __syncwarp() { Together("__syncwarp"); }
int __shfl_sync(unsigned, int value, int source) {
  return Together("__shfl_sync", value)[source % kLanes];
}
int __shfl_up_sync(unsigned, int value, int distance) {
  const uint32_t* const values = Together("__shfl_up_sync", value);
  const int lane = current->lane;
  return values[lane >= distance ? lane - distance : lane];
}
int __reduce_add_sync(unsigned, int value) {
  const uint32_t* const values = Together("__reduce_add_sync", value);
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += values[i];
  return sum;
}
unsigned __ballot_sync(unsigned, bool value) {
  const uint32_t* const values = Together("__ballot_sync", value);
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= values[i] << i;
  return bits;
}
bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }

void barrier_sync(int id, int threads) { ArriveAtNamedBarrier(id, threads, true); }
void barrier_arrive(int id, int threads) { ArriveAtNamedBarrier(id, threads, false); }
void barrier_cluster_arrive_relaxed() { ArriveAtCluster(); }
void barrier_cluster_arrive() {
  while (current->remote_arrivals > 0) Yield();  // released with the rest of what it has written
  ArriveAtCluster();
}
void barrier_cluster_wait() {
  while (cluster_phase < current->cluster_arrivals) WaitIn(cluster_waiting);
}

uint32_t smem_address(const void*) { return AtRank(kFirstOffset, current->cta->rank); }
uint32_t mapa(uint32_t address, uint32_t rank) { return AtRank(address, rank); }
float ld_shared(uint32_t address) {
  MaybeYield();
  return Load<float>(address);
}
int ld_shared_s32(uint32_t address) {
  MaybeYield();
  return Load<int>(address);
}
void st_shared_s32(uint32_t address, int value) { Store(address, value); }
float4 ld_shared_v4(uint32_t address) {
  MaybeYield();
  return Load<float4>(address);
}
int4 ld_shared_v4_s32(uint32_t address) {
  MaybeYield();
  return Load<int4>(address);
}
void st_shared_v4_s32(uint32_t address, int4 v) { Store(address, v); }
void st_global_v4_s32(void* address, int4 v) {
  CHECK(reinterpret_cast<uintptr_t>(address) % 16 == 0, "16 bytes are stored at %p", address);
  WriteD(static_cast<char*>(address), &v, sizeof v);
}

void st_async_v4(uint32_t remote_address, float x, float y, float z, float w,
                 uint32_t remote_barrier) {
  CHECK(remote_address >> kRankShift == remote_barrier >> kRankShift,
        "st.async to one CTA with a barrier in another");
  char* const to = Shared(remote_address, 16, 16);
  const float4 v = {x, y, z, w};
  const Signal signal(remote_barrier, "st.async");
  Start([=] {
    std::memcpy(to, &v, sizeof v);
    signal.Bytes(sizeof v);
  });
}

// Lane l holds two neighbours of row l / 4 of each matrix, and the address of row l % 8 of matrix
// l / 8.
template <int kMatrices>
static void StoreMatrices(const char* name, uint32_t address, const uint32_t (&r)[kMatrices]) {
  const uint32_t* const rows = Together(name, address);
  const int lane = current->lane;
  for (int i = 0; i < kMatrices; ++i) {
    std::memcpy(Own(rows[8 * i + lane / 4], 16, 16) + lane % 4 * 4, &r[i], 4);
  }
}
void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  StoreMatrices<4>("stmatrix.x4", address, {r0, r1, r2, r3});
}
void stmatrix_x2(uint32_t address, uint32_t r0, uint32_t r1) {
  StoreMatrices<2>("stmatrix.x2", address, {r0, r1});
}
static uint32_t ToBf16(float value) {
  if (std::isnan(value)) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
uint32_t cvt_bf16x2(float low, float high) { return ToBf16(low) | ToBf16(high) << 16; }

void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  Own(barrier, 8, 8);
  const int count = arrivals;
  const bool is_new =
      current->cta->mbarriers.insert({barrier & kOffsetMask, {.arrivals = count, .pending = count}})
          .second;
  CHECK(is_new, "the mbarrier at %#x is made twice", barrier);
  MaybeYield();
}
void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive(barrier, 1); }
void mbarrier_arrive(uint32_t barrier, int arrivals) {
  for (int i = 0; i < arrivals; ++i) Arrive(OwnMbarrier(barrier));
  MaybeYield();
}
void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  OwnMbarrier(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}
void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
  OwnMbarrier(barrier).bytes += bytes;
  MaybeYield();
}
void mbarrier_arrive_remote(uint32_t remote_barrier) {
  Thread* const thread = current;
  ++thread->remote_arrivals;
  Start([=] {
    --thread->remote_arrivals;
    CheckRunning(remote_barrier, "a remote arrival");
    Arrive(MbarrierAt(remote_barrier));
  });
}
bool mbarrier_test_wait(uint32_t barrier, uint32_t parity) {
  MaybeYield();
  return HasCompleted(OwnMbarrier(barrier), parity);
}
void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  Mbarrier& waited = OwnMbarrier(barrier);
  while (!HasCompleted(waited, parity)) WaitIn(waited.waiting);
  MaybeYield();
}
void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }

void tma_load_2d(uint32_t smem, const TensorMap& map, uint32_t barrier, int x, int y) {
  Own(barrier, 8, 8);
  LoadBox(smem, Modelled(map), barrier, x, y, 1u << current->cta->rank);
}
void tma_load_2d_multicast(uint32_t smem, const TensorMap& map, uint32_t barrier, int x, int y,
                           unsigned short mask) {
  LoadBox(smem, Modelled(map), barrier, x, y, mask);
}
void cp_async_4(uint32_t smem, const void* source) {
  CheckScales(source, 4);
  char* const to = Own(smem, 4, 4);
  std::memset(to, kPoison, 4);
  Thread* const thread = current;
  const int64_t number = thread->cp_asyncs++;
  thread->cp_pending.insert(number);
  Start([=] {
    CheckRunning(smem, "cp.async");
    std::memcpy(to, source, 4);
    thread->cp_pending.erase(number);
  });
}
void cp_async_mbarrier_arrive(uint32_t barrier) {
  Own(barrier, 8, 8);
  Thread* const thread = current;
  const int64_t number = thread->cp_asyncs++;
  const Signal signal(barrier, "the arrival of cp.async");
  Start([=] { signal.Arrival(); },
        [=] { return thread->cp_pending.empty() || *thread->cp_pending.begin() > number; });
}

void tma_store_2d(const TensorMap& opaque, uint32_t smem, int x, int y) {
  const emulator::TensorMap& map = Modelled(opaque);
  CHECK(x >= 0 && y >= 0, "a store begins before D");
  Own(smem, map.box_row_bytes * map.box_rows, 128);
  Thread* const thread = current;
  ++thread->stores;
  Start([=, &map] {
    ForEachChunk(map, smem, x * int64_t{map.element_bytes}, y,
                 [&](uint32_t from, char* to, int count) {
                   if (to != nullptr) WriteD(to, thread->cta->smem + from, count);
                 });
    if (--thread->stores > 0 || !thread->waits_for_stores) return;
    thread->waits_for_stores = false;
    runnable.push_back(thread);
  });
}
void cp_async_bulk_commit_group() {}
void wait_for_stores() {
  if (current->stores == 0) return;
  current->waits_for_stores = true;
  Block();
}

void start_wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulates) {
  if (!accumulates) std::fill_n(d, n / 2, NAN);
  current->wgmmas.push_back({d, n, a, b, accumulates});
}
void wgmma_commit_group() {
  Thread* const thread = current;
  const auto group = std::make_shared<WgmmaGroup>();
  group->instructions.swap(thread->wgmmas);
  thread->groups.push_back(group);
  const Timing::Wgmma timing = launch->timing.wgmma;
  switch (timing == Timing::kAny ? static_cast<Timing::Wgmma>(Random(3)) : timing) {
    case Timing::kAtCommit:
      Complete(*thread, *group);
      break;
    case Timing::kBetween:
      operations.push_back({[=] { Complete(*thread, *group); }, nullptr});
      break;
    default:
      break;
  }
  MaybeYield();
}
void wait_for_wgmma(int pending) {
  MaybeYield();
  while (static_cast<int>(current->groups.size()) > pending) {
    Complete(*current, *current->groups.front());
    current->groups.pop_front();
  }
}

}  // namespace dg
