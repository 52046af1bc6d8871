// Random problems for one kernel, on the emulator, against plain arithmetic.
//
//   emulator FIRST COUNT MAX_M   runs problems FIRST, FIRST + 1, ... of up to MAX_M rows
//
// Exits with 0 if all results are right, and with 1 and a message at the first error. Numbers are
// such that sums are exact, whatever their order; rows that nobody should read, and their scales,
// are NaN, and memory around each array is not there.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "csrc/gemm/config.h"
#include "csrc/gemm/tensor_maps.h"
#include "tests/emulator/kernel.h"
#include "tests/emulator/machine.h"

namespace emulator {
namespace {

constexpr int kFewRows = 40;  // the first problems have 1, 2, ... rows
constexpr int kAnyInt = 0x7fffffff;
constexpr uint16_t kUntouched = 0x5a5a;
constexpr uint8_t kNan = 0x7f;  // fp8
constexpr float kScaleNan = NAN;

int Random(std::mt19937_64& rng, int64_t n) { return static_cast<int>(rng() % n); }
int Choose(std::mt19937_64& rng, const std::vector<int>& values) {
  return values[Random(rng, values.size())];
}

// An array at the end of its pages, as far as alignment allows, with none before and behind.
template <typename T>
class Array {
 public:
  explicit Array(int64_t size, int64_t alignment = 16) : size_(size) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t bytes = size * sizeof(T);
    const int64_t inside = (bytes + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    base_ =
        static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, inside, PROT_READ | PROT_WRITE) != 0) {
      Fail("no memory");
    }
    data_ = reinterpret_cast<T*>(base_ + page + (inside - bytes) / alignment * alignment);
  }
  Array(const Array&) = delete;
  ~Array() { munmap(base_, mapped_); }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }
  Range range() const {
    return {reinterpret_cast<const char*>(data_), size_ * static_cast<int64_t>(sizeof(T))};
  }

 private:
  int64_t size_;
  int64_t mapped_;
  char* base_;
  T* data_;
};

// Which rows go with which matrix, as the kernel is told and as it is.
struct Rows {
  static constexpr int kZero = -1;       // the row becomes zero
  static constexpr int kUnwritten = -2;  // it stays

  int m = 0;
  int num_groups = 1;
  int num_sizes = 0;
  int max_m = 0;
  int expected_m = 0;
  bool fill_zero = false;
  std::vector<int> groups;  // KernelParams
  std::vector<int> detail;
  std::vector<int> group;  // of each row, or one of the above
};

Rows Dense(std::mt19937_64& rng, int max_m, int number) {
  Rows rows;
  rows.m = number < kFewRows ? number + 1 : 1 + Random(rng, max_m);
  if (!kKernel.has_parts && kKernel.cluster_n == 1 && rows.m > kKernel.block_m) {
    rows.m -= rows.m % kKernel.block_m;
  }
  rows.group.assign(rows.m, 0);
  return rows;
}

// Blocks of 128 rows: a group's first rows, or all, or none of them; sorted or not.
Rows Contiguous(std::mt19937_64& rng, int max_m) {
  constexpr int kBlock = dg::kContiguousAlignment;
  Rows rows;
  rows.num_groups = 1 + Random(rng, 5);
  rows.m = 1 + Random(rng, max_m);
  const std::vector<int> padding = {-1, -7, rows.num_groups, kAnyInt};
  for (int begin = 0; begin < rows.m; begin += kBlock) {
    const int end = std::min(begin + kBlock, rows.m);
    const int last = begin == 0 ? -1 : rows.group[begin - kBlock];
    const int group = last >= 0 && Random(rng, 2) == 0 ? last : Random(rng, rows.num_groups);
    const int cut = Choose(rng, {0, 1 + Random(rng, kBlock - 1), kBlock, kBlock});
    const bool holes = Random(rng, 4) == 0;
    bool has_group = false, has_padding = end - begin < kBlock;
    for (int row = begin; row < end; ++row) {
      const bool is_padding = row - begin >= cut || (holes && Random(rng, 3) == 0);
      rows.detail.push_back(is_padding ? Choose(rng, padding) : group);
      rows.group.push_back(is_padding ? Rows::kZero : group);
      (is_padding ? has_padding : has_group) = true;
    }
    rows.groups.push_back(has_group ? 2 * group + has_padding : -1);
  }
  return rows;
}

int GroupCount(std::mt19937_64& rng) { return 1 + Random(rng, Choose(rng, {6, 6, 70})); }

Rows Masked(std::mt19937_64& rng, int max_m) {
  Rows rows;
  rows.num_groups = GroupCount(rng);
  rows.max_m = 1 + Random(rng, std::max(1, max_m / rows.num_groups));
  rows.m = rows.num_groups * rows.max_m;
  rows.expected_m = 1 + Random(rng, rows.max_m);
  rows.fill_zero = Random(rng, 2) == 0;
  for (int group = 0; group < rows.num_groups; ++group) {
    const int some = Random(rng, rows.max_m + 1);
    const int count = Choose(rng, {-5, 0, 1, some, some, rows.max_m, rows.max_m + 9, kAnyInt});
    rows.groups.push_back(count);
    for (int row = 0; row < rows.max_m; ++row) {
      const int rest = rows.fill_zero ? Rows::kZero : Rows::kUnwritten;
      rows.group.push_back(row < count ? group : rest);
    }
  }
  return rows;
}

// B holds a slice of the groups, which may begin before the first one or after the last one.
Rows Ragged(std::mt19937_64& rng, int max_m) {
  Rows rows;
  rows.num_groups = GroupCount(rng);
  rows.num_sizes = rows.num_groups + Random(rng, 4);
  rows.m = 1 + Random(rng, max_m);
  const int offset = Choose(rng, {0, 0, 0, 1, -1, 2, rows.num_sizes, rows.num_sizes + 5,
                                  -rows.num_groups, -rows.num_groups - 3, kAnyInt, -kAnyInt - 1});
  const bool too_many = Random(rng, 4) == 0;
  for (int i = 0; i < rows.num_sizes; ++i) {
    const int some = Random(rng, 2 * rows.m / rows.num_groups + 2);
    const int size = Choose(rng, {0, 1, some, some, some, too_many ? kAnyInt : -3});
    rows.groups.push_back(size);
    const int64_t group = int64_t{i} - offset;
    const int left = rows.m - static_cast<int>(rows.group.size());
    rows.group.insert(
        rows.group.end(), std::clamp(size, 0, left),
        group >= 0 && group < rows.num_groups ? static_cast<int>(group) : Rows::kZero);
  }
  rows.group.resize(rows.m, Rows::kZero);
  rows.detail = {offset};
  return rows;
}

Rows RandomRows(std::mt19937_64& rng, int max_m, int number) {
  switch (static_cast<dg::Grouping>(kKernel.grouping)) {
    case dg::Grouping::kContiguous:
      return Contiguous(rng, max_m);
    case dg::Grouping::kMasked:
      return Masked(rng, max_m);
    case dg::Grouping::kRagged:
      return Ragged(rng, max_m);
    default:
      return Dense(rng, max_m, number);
  }
}

Timing RandomTiming(std::mt19937_64& rng) {
  Timing timing;
  timing.wgmma = static_cast<Timing::Wgmma>(Random(rng, 4));
  timing.starved =
      Random(rng, 2) == 0 ? Timing::kNobody : static_cast<Timing::Starved>(Random(rng, 5));
  timing.completions = Choose(rng, {2, 20, 200, 900});
  return timing;
}

TensorMap Model(const dg::TensorMapSpec& spec, void* base) {
  return {static_cast<char*>(base),
          spec.element_bytes,
          spec.columns * spec.element_bytes,
          spec.rows,
          spec.pitch_bytes,
          spec.box_columns * spec.element_bytes,
          spec.box_rows,
          spec.swizzle_bytes};
}

// 0, 1, 2, -1, -2, as fp8 and as floats.
constexpr uint8_t kValueBits[] = {0x00, 0x38, 0x40, 0xb8, 0xc0};
constexpr float kValues[] = {0, 1, 2, -1, -2};

// Fills an array with them and returns which ones they are.
std::vector<float> FillValues(std::mt19937_64& rng, const Array<uint8_t>& bits) {
  std::vector<float> values(bits.size());
  for (int64_t i = 0; i < bits.size(); ++i) {
    const int which = Random(rng, 5);
    bits[i] = kValueBits[which];
    values[i] = kValues[which];
  }
  return values;
}

float RandomScale(std::mt19937_64& rng) { return std::ldexp(1.0f, Random(rng, 3) - 1); }

uint16_t RoundToBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void RunProblem(int number, int max_m) {
  std::mt19937_64 rng(number);
  const Rows rows = RandomRows(rng, max_m, number);
  const int64_t m = rows.m, n = kKernel.n, k = kKernel.k;
  dg::GemmProblem gemm = {};
  gemm.grouping = static_cast<dg::Grouping>(kKernel.grouping);
  gemm.num_groups = rows.num_groups;
  gemm.m = m;
  gemm.expected_m = rows.expected_m;
  gemm.n = n;
  gemm.k = k;
  gemm.batch_invariant = kKernel.batch_invariant;
  const dg::GemmConfig config = {kKernel.block_m,         kKernel.block_n,   kKernel.num_stages,
                                 kKernel.math_warpgroups, kKernel.cluster_m, kKernel.cluster_n,
                                 kKernel.cluster_k,       kKernel.raster_m};
  gemm.num_sms = config.cluster_size() * (1 + Random(rng, 4));

  const int64_t k_blocks = dg::CeilDiv(k, 128), n_blocks = dg::CeilDiv(n, 128);
  const int64_t pitch = Random(rng, 3) == 0 ? dg::CeilDiv(m, 4) * 4 : m;
  const Timing timing = RandomTiming(rng);
  const std::string description = "problem " + std::to_string(number) +
                                  ", m = " + std::to_string(m) + ", pitch " +
                                  std::to_string(pitch) + ", " + std::to_string(rows.num_groups) +
                                  " groups, " + std::to_string(gemm.num_sms) + " SMs";
  problem = description.c_str();
  std::string illegal = dg::WhyUnsupported(gemm);
  if (illegal.empty()) illegal = dg::WhyIllegal(gemm, config);
  if (illegal.empty() && !kKernel.has_parts && dg::HasParts(gemm, config)) illegal = "parts";
  if (!illegal.empty()) Fail("%s", illegal.c_str());
  if (config.smem().total_bytes() != kKernel.smem_bytes || config.threads() != kKernel.threads) {
    Fail("host and device do not agree on the launch");
  }

  const Array<uint8_t> a(m * k), b(rows.num_groups * n * k);
  const Array<float> sfa(k_blocks * pitch), sfb(rows.num_groups * n_blocks * k_blocks);
  const Array<uint16_t> d(m * n);
  const Array<int> groups(rows.groups.size(), sizeof(int)), detail(rows.detail.size(), sizeof(int));
  const std::vector<float> a_values = FillValues(rng, a);
  const std::vector<float> b_values = FillValues(rng, b);
  for (int64_t i = 0; i < sfa.size(); ++i) sfa[i] = RandomScale(rng);
  for (int64_t i = 0; i < sfb.size(); ++i) sfb[i] = RandomScale(rng);
  for (int64_t row = 0; row < pitch; ++row) {
    if (row < m && rows.group[row] >= 0) continue;
    for (int64_t block = 0; block < k_blocks; ++block) sfa[block * pitch + row] = kScaleNan;
    if (row < m) std::fill_n(a.data() + row * k, k, kNan);
  }
  std::fill_n(d.data(), d.size(), kUntouched);
  std::copy(rows.groups.begin(), rows.groups.end(), groups.data());
  std::copy(rows.detail.begin(), rows.detail.end(), detail.data());

  const dg::TensorMapSpecs maps = dg::MakeTensorMapSpecs(gemm, config, kKernel.has_parts, pitch);
  Launch launch = {};
  for (int i = 0; i < maps.num_a; ++i) launch.a[i] = Model(maps.a[i], a.data());
  launch.b = Model(maps.b, b.data());
  launch.map_sfa = Model(maps.sfa, sfa.data());
  launch.d = Model(maps.d, d.data());
  launch.params.sfa = sfa.data();
  launch.params.sfb = sfb.data();
  launch.params.d = d.data();
  launch.params.groups = groups.data();
  launch.params.detail = detail.data();
  launch.params.m = rows.m;
  launch.params.sfa_pitch = static_cast<int>(pitch);
  launch.params.part_rows = maps.part_rows;
  launch.params.num_groups = rows.num_groups;
  launch.params.num_sizes = rows.num_sizes;
  launch.params.max_m = rows.max_m;
  launch.params.fill_zero = rows.fill_zero;
  launch.sfa = sfa.range();
  launch.sfb = sfb.range();
  launch.grid = dg::GridSize(gemm, config);
  launch.cluster_size = config.cluster_size();
  launch.timing = timing;
  const std::vector<uint8_t> writes = Run(launch, rng);
  if (kKernel.streams_only) return;  // it has come to its end

  for (int64_t row = 0; row < m; ++row) {
    const int64_t group = rows.group[row];
    for (int64_t column = 0; column < n; ++column) {
      const int64_t at = row * n + column;
      float sum = 0;
      for (int64_t block = 0; group >= 0 && block < k_blocks; ++block) {
        float partial = 0;
        const int64_t end = std::min(k, block * 128 + 128);
        for (int64_t i = block * 128; i < end; ++i) {
          partial += a_values[row * k + i] * b_values[(group * n + column) * k + i];
        }
        sum += partial * sfa[block * pitch + row] *
               sfb[(group * n_blocks + column / 128) * k_blocks + block];
      }
      const bool untouched = group == Rows::kUnwritten;
      const uint16_t wanted = untouched ? kUntouched : RoundToBf16(sum + 0.0f);
      const bool zeros = (d[at] & 0x7fff) == 0 && (wanted & 0x7fff) == 0;  // of either sign
      if (writes[at] != (untouched ? 0 : 1)) {
        Fail("row %d, column %d of D was written %d times", int(row), int(column), writes[at]);
      }
      if (d[at] != wanted && !zeros) {
        Fail("row %d, column %d of D is %#06x, not %#06x", int(row), int(column), d[at], wanted);
      }
    }
  }
}

}  // namespace
}  // namespace emulator

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int first = std::atoi(argv[1]), count = std::atoi(argv[2]), max_m = std::atoi(argv[3]);
  for (int i = first; i < first + count; ++i) emulator::RunProblem(i, max_m);
  return 0;
}
