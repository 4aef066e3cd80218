#pragma once

#include <cstdint>

/// The versions of bnb4.h's inner loops, one per instruction set.
namespace budwood::quant::kernels {

/// How a type is encoded: index = number of thresholds below the value, code = order[index].
struct Bnb4Encoding {
  float thresholds[16];  ///< ascending; [15] is unused
  int32_t order[16];
};

/// What the 16 codes stand for; planes[k][c] is byte k of entries[c], lowest first.
struct Bnb4Table {
  float entries[16];
  uint8_t planes[4][16];
};

struct Bnb4Path {
  /// Elements [begin, begin + n); absmax[0] belongs to the block that holds begin.
  void (*decode)(const Bnb4Table& table, const uint8_t* codes, const float* absmax,
                 int64_t block_size, int64_t begin, int64_t n, float* dst);
  /// One full block to block_size / 2 bytes; false when it holds a NaN or an infinity.
  bool (*encode)(const Bnb4Encoding& encoding, const float* src, int64_t block_size, uint8_t* codes,
                 float* absmax);
  /// out[r] = sum over i of w[r][i] * x[i], summed as GemmPath::dot does, for four rows of `groups`
  /// runs of 64 elements, each run with a scale of its own. Null where decoding first is as fast.
  void (*dot)(const Bnb4Table& table, const uint8_t* const* codes, const float* const* scales,
              int64_t groups, const float* x, float* out);
};

extern const Bnb4Path kBnb4Scalar;
extern const Bnb4Path kBnb4Avx2;
extern const Bnb4Path kBnb4Avx512;

/// The short last block: divides by absmax where a full block multiplies by its inverse.
bool encode_bnb4_tail(const Bnb4Encoding& encoding, const float* src, int64_t n, uint8_t* codes,
                      float* absmax);

}  // namespace budwood::quant::kernels
