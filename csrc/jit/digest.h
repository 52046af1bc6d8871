// SHA-256 (FIPS 180-4), for cache keys and checksums.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace dg::jit {

// A SHA-256 computation over one or more pieces.
class Sha256 {
 public:
  // `portable`: without the processor's SHA extensions even where it has them, for tests.
  explicit Sha256(bool portable = false);

  // Appends bytes to the message.
  void Update(std::string_view bytes);

  // Appends a field with its length, so that no two lists of fields give the same message.
  void UpdateField(std::string_view field);

  // The digest as 64 lower-case hex digits; the object is spent afterwards.
  std::string HexDigest();

 private:
  void (*compress_)(std::array<std::uint32_t, 8>& state, const unsigned char* block,
                    std::size_t num_blocks);
  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> block_ = {};
  std::uint64_t total_bytes_ = 0;
};

// SHA-256 of one string as hex digits.
std::string Sha256Hex(std::string_view bytes, bool portable = false);

}  // namespace dg::jit
