#pragma once

#include <cstdint>

/// The bytes of a token file; docs/formats.md describes them.
namespace budwood::train {

inline constexpr char kHeadMagic[9] = "BUDWTOKS";
inline constexpr char kFootMagic[9] = "BUDWTEND";
inline constexpr uint32_t kTokenVersion = 1;
inline constexpr uint64_t kHeadBytes = 64;
inline constexpr uint64_t kFootBytes = 128;
inline constexpr uint64_t kMaxVocabulary = 0x7fffffff;

struct TokenFoot {
  char magic[8];
  uint64_t vocab_size, rows, tokens, counted;
  char fingerprint[64];
  uint64_t zeros[2];
  uint32_t data_crc, foot_crc;
};
static_assert(sizeof(TokenFoot) == kFootBytes);

constexpr uint64_t round_up_8(uint64_t n) {
  return (n + 7) / 8 * 8;
}

/// Where the parts begin, in bytes; the ids begin at kHeadBytes.
struct TokenLayout {
  constexpr TokenLayout(uint64_t tokens, uint64_t rows)
      : mask(round_up_8(kHeadBytes + 4 * tokens)),
        offsets(round_up_8(mask + (tokens + 7) / 8)),
        size(offsets + 8 * (rows + 1) + kFootBytes) {}
  uint64_t mask, offsets, size;
};

constexpr bool is_printable(char c) {
  return c > ' ' && c <= '~';
}

}  // namespace budwood::train
