#include "csrc/jit/interleave.h"

#include <elf.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "csrc/jit/error.h"

namespace dg::jit {
namespace {

// An sm_90 instruction is 128 bits. NOTE: the encoding is undocumented; opcode and control field
// were read off ptxas' output and agree with published disassembler work (CuAssembler).
//   bits   11-0   opcode; 0x223 = FFMA with four registers
//   bits   23-16  destination; 31-24, 39-32 and 71-64 the operands a, b and c of a * b + c
//   bits 108-105  stall: cycles until the warp may issue its next instruction
//   bit  109      yield, inverted: 0 = prefer another warp next
//   bits 125-122  reuse: one bit per operand slot (a first), kept for the warp's next instruction
struct Instruction {
  std::uint64_t low;
  std::uint64_t high;
};
static_assert(sizeof(Instruction) == 16, "sm_90 instructions are 16 bytes");

constexpr std::uint64_t kOpcodeMask = 0xfff;
constexpr std::uint64_t kFfma = 0x223;
constexpr std::uint64_t kNoYield = std::uint64_t{1} << (109 - 64);
constexpr std::uint64_t kReuse = std::uint64_t{0xf} << (122 - 64);
constexpr int kZeroRegister = 255;

Instruction Read(const std::string& image, std::size_t offset) {
  Instruction instruction;
  std::memcpy(&instruction, image.data() + offset, sizeof(instruction));
  return instruction;
}

void Write(std::string& image, std::size_t offset, const Instruction& instruction) {
  std::memcpy(image.data() + offset, &instruction, sizeof(instruction));
}

bool IsFfma(const Instruction& instruction) { return (instruction.low & kOpcodeMask) == kFfma; }
bool Yields(const Instruction& instruction) { return (instruction.high & kNoYield) == 0; }
bool Reuses(const Instruction& instruction) { return (instruction.high & kReuse) != 0; }

// A run's instructions that match, counted over the image as it is now.
int Count(const std::string& image, std::size_t begin, std::size_t end,
          bool (*matches)(const Instruction&)) {
  int count = 0;
  for (std::size_t i = begin; i < end; i += sizeof(Instruction)) count += matches(Read(image, i));
  return count;
}

// Whether most instructions of the run differ from the one before in yielding. ptxas alternates all
// of a run or nothing, save for an irregular pair here and there.
bool Alternates(const std::string& image, std::size_t begin, std::size_t end) {
  int differing = 0;
  int pairs = 0;
  for (std::size_t i = begin + sizeof(Instruction); i < end; i += sizeof(Instruction), ++pairs) {
    differing += Yields(Read(image, i)) != Yields(Read(image, i - sizeof(Instruction)));
  }
  return 2 * differing > pairs;
}

// The operand registers of an FFMA, by slot.
constexpr int kSlots = 3;
std::array<int, kSlots> Operands(const Instruction& ffma) {
  return {static_cast<int>(ffma.low >> 24 & 0xff), static_cast<int>(ffma.low >> 32 & 0xff),
          static_cast<int>(ffma.high & 0xff)};
}
int Destination(const Instruction& ffma) { return static_cast<int>(ffma.low >> 16 & 0xff); }

// The slots of `ffma` whose register the next instruction reads in the same slot, unchanged.
std::uint64_t Shared(const Instruction& ffma, const Instruction& next) {
  std::uint64_t reuse = 0;
  for (int slot = 0; slot < kSlots; ++slot) {
    const int operand = Operands(ffma)[slot];
    if (operand != kZeroRegister && operand != Destination(ffma) &&
        operand == Operands(next)[slot]) {
      reuse |= std::uint64_t{1} << (122 - 64 + slot);
    }
  }
  return reuse;
}

// Makes every kYieldPeriod-th instruction of the run yield and no other one, and the others keep
// the operands that they share with the next.
//
// Yield is only a hint to the scheduler, so either value is correct. A yielding instruction must
// not keep operands: the cache serves the instruction issued next, and after a yield that is
// another warp's. What the last one keeps is for an instruction that the pass knows nothing about.
void Interleave(std::string& image, std::size_t begin, std::size_t end) {
  int position = 0;
  for (std::size_t i = begin; i < end; i += sizeof(Instruction)) {
    Instruction instruction = Read(image, i);
    const std::size_t next = i + sizeof(Instruction);
    if (++position % kYieldPeriod == 0) {
      instruction.high &= ~(kNoYield | kReuse);
    } else {
      instruction.high |= kNoYield;
      if (next < end) {
        instruction.high = (instruction.high & ~kReuse) | Shared(instruction, Read(image, next));
      }
    }
    Write(image, i, instruction);
  }
}

[[noreturn]] void ThrowMalformed(const char* what) {
  throw Error(ErrorCode::kInvalidArgument, std::string("not an sm_90 cubin: ") + what);
}

// Copies a structure out of the image, which need not be aligned.
template <typename T>
T ReadAt(const std::string& image, std::uint64_t offset, const char* what) {
  if (offset > image.size() || image.size() - offset < sizeof(T)) ThrowMalformed(what);
  T value;
  std::memcpy(&value, image.data() + offset, sizeof(T));
  return value;
}

Elf64_Shdr Section(const std::string& image, const Elf64_Ehdr& header, std::uint64_t index) {
  constexpr char kWhat[] = "section header outside the file";
  if (header.e_shoff > image.size()) ThrowMalformed(kWhat);
  return ReadAt<Elf64_Shdr>(image, header.e_shoff + index * sizeof(Elf64_Shdr), kWhat);
}

}  // namespace

std::vector<FfmaRun> InterleaveFfma(std::string& image) {
  const auto header = ReadAt<Elf64_Ehdr>(image, 0, "too short for an ELF header");
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64 ||
      header.e_shentsize != sizeof(Elf64_Shdr) || header.e_shstrndx >= header.e_shnum) {
    ThrowMalformed("not a 64-bit ELF file with sections");
  }
  const Elf64_Shdr names = Section(image, header, header.e_shstrndx);

  std::vector<FfmaRun> runs;
  for (std::uint64_t index = 0; index < header.e_shnum; ++index) {
    const Elf64_Shdr section = Section(image, header, index);
    if (section.sh_type != SHT_PROGBITS) continue;
    if (names.sh_offset > image.size() || section.sh_name >= image.size() - names.sh_offset) {
      ThrowMalformed("section name outside the file");
    }
    const std::string name = image.c_str() + names.sh_offset + section.sh_name;
    if (name.rfind(".text.", 0) != 0) continue;
    if (section.sh_offset > image.size() || section.sh_size > image.size() - section.sh_offset ||
        section.sh_size % sizeof(Instruction) != 0) {
      ThrowMalformed("code section outside the file or cut");
    }
    const std::size_t end = section.sh_offset + section.sh_size;
    for (std::size_t begin = section.sh_offset; begin < end;) {
      std::size_t run_end = begin;
      while (run_end < end && IsFfma(Read(image, run_end))) run_end += sizeof(Instruction);
      const int length = static_cast<int>((run_end - begin) / sizeof(Instruction));
      if (length >= kMinFfmaRun) {
        FfmaRun run = {};
        run.section = name;
        run.offset = begin - section.sh_offset;
        run.length = length;
        run.reuse_before = Count(image, begin, run_end, Reuses);
        run.yield_before = Count(image, begin, run_end, Yields);
        run.alternates = Alternates(image, begin, run_end);
        if (run.alternates) Interleave(image, begin, run_end);
        run.reuse_after = Count(image, begin, run_end, Reuses);
        run.yield_after = Count(image, begin, run_end, Yields);
        runs.push_back(run);
      }
      begin = run_end + sizeof(Instruction);
    }
  }
  return runs;
}

}  // namespace dg::jit
