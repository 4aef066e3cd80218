#pragma once

// g++ 12 warns of its own _mm512_undefined_*().
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstdint>
#include <cstring>

/// Pieces of the AVX-512 kernels. Everything is static: a function with external linkage, compiled
/// here with AVX-512, could be picked by the linker for machines that lack it.
namespace budwood::quant::kernels {

static inline __m128i load_bytes(const void* src) {
  return _mm_loadu_si128(static_cast<const __m128i*>(src));
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

/// 16 signed (unsigned) bytes as floats.
static inline __m512 floats_of_i8(__m128i bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
static inline __m512 floats_of_u8(__m128i bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

/// The first `count` of 16 lanes, 0 <= count <= 16.
static inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}

/// max |x| as bits over n floats; bits sort like the magnitudes, NaN above infinity.
static inline int32_t largest_magnitude_bits(const float* src, int64_t n) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i < 16 ? n - i : 16);
    const __m512i bits = _mm512_maskz_loadu_epi32(lanes, src + i);
    most = _mm512_max_epi32(most, _mm512_and_si512(bits, mask));
  }
  return _mm512_reduce_max_epi32(most);
}

/// The upper half of the lanes is added to the lower, four times.
static inline float sum_of(__m512 lanes) {
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(lanes), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), upper);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace budwood::quant::kernels
