#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

/// Pieces of the AVX2 kernels. Everything is static: a function with external linkage, compiled
/// here with AVX2, could be picked by the linker for machines that lack it.
namespace budwood::quant::kernels {

static inline __m128i load_bytes(const void* src) {
  return _mm_loadu_si128(static_cast<const __m128i*>(src));
}

static inline __m128i load_8_bytes(const void* src) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(src));
}

static inline uint16_t load_u16(const void* src) {
  uint16_t value;
  std::memcpy(&value, src, sizeof value);
  return value;
}

static inline float load_fp16(const void* src) {
  return _cvtsh_ss(load_u16(src));
}

/// Low and high nibbles of 16 bytes, each in 0..15.
static inline __m128i low_nibbles(__m128i bytes) {
  return _mm_and_si128(bytes, _mm_set1_epi8(15));
}
static inline __m128i high_nibbles(__m128i bytes) {
  return _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
}

/// The lower 8 signed (unsigned) bytes as floats.
static inline __m256 floats_of_i8(__m128i bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
static inline __m256 floats_of_u8(__m128i bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

static inline __m128i upper_8(__m128i bytes) {
  return _mm_unpackhi_epi64(bytes, bytes);
}

/// Bits of |value| as signed integers; they sort like the magnitudes, NaN above infinity.
static inline __m256i magnitude_bits(__m256 value) {
  return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
}

static inline int32_t largest(__m256i v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
}

/// max |x| as bits over n floats.
static inline int32_t largest_magnitude_bits(const float* src, int64_t n) {
  __m256i most = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    most = _mm256_max_epi32(most, magnitude_bits(_mm256_loadu_ps(src + i)));
  }
  if (i < n) {
    float rest[8] = {};
    std::memcpy(rest, src + i, static_cast<size_t>(n - i) * sizeof(float));
    most = _mm256_max_epi32(most, magnitude_bits(_mm256_loadu_ps(rest)));
  }
  return largest(most);
}

/// 16 integers in 0..255 (or -128..127), in order, as 16 bytes.
static inline __m128i pack_bytes(__m256i first, __m256i second, bool is_signed) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
  const __m128i low = _mm256_castsi256_si128(words);
  const __m128i high = _mm256_extracti128_si256(words, 1);
  return is_signed ? _mm_packs_epi16(low, high) : _mm_packus_epi16(low, high);
}

}  // namespace budwood::quant::kernels
