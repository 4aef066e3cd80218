#include <budwood/quant/kernels/bnb4_paths.h>
#include <budwood/quant/kernels/vectors_avx512.h>

namespace budwood::quant::kernels {
namespace {

/// Values of the 32 elements in 16 bytes, high nibbles first.
__m512 first_sixteen(__m512 table, __m128i bytes) {
  const __m128i index = _mm_unpacklo_epi8(high_nibbles(bytes), low_nibbles(bytes));
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(index), table);
}
__m512 second_sixteen(__m512 table, __m128i bytes) {
  const __m128i index = _mm_unpackhi_epi8(high_nibbles(bytes), low_nibbles(bytes));
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(index), table);
}

/// n elements of one block from position begin.
void decode_run(const float* entries, __m512 table, const uint8_t* codes, int64_t begin, int64_t n,
                float scale, float* dst) {
  codes += begin / 2;
  if ((begin & 1) != 0 && n > 0) {
    *dst++ = entries[*codes++ & 15] * scale;
    --n;
  }
  const __m512 scales = _mm512_set1_ps(scale);
  for (; n >= 32; n -= 32, codes += 16, dst += 32) {
    const __m128i bytes = load_bytes(codes);
    _mm512_storeu_ps(dst, _mm512_mul_ps(first_sixteen(table, bytes), scales));
    _mm512_storeu_ps(dst + 16, _mm512_mul_ps(second_sixteen(table, bytes), scales));
  }
  if (n > 0) {
    const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes((n + 1) / 2), codes);
    const __mmask16 lanes = first_lanes(n < 16 ? n : 16);
    const __mmask16 more = first_lanes(n < 16 ? 0 : n - 16);
    _mm512_mask_storeu_ps(dst, lanes, _mm512_mul_ps(first_sixteen(table, bytes), scales));
    _mm512_mask_storeu_ps(dst + 16, more, _mm512_mul_ps(second_sixteen(table, bytes), scales));
  }
}

void decode(const Bnb4Table& of_type, const uint8_t* codes, const float* absmax, int64_t block_size,
            int64_t begin, int64_t n, float* dst) {
  const __m512 table = _mm512_loadu_ps(of_type.entries);
  while (n > 0) {
    const int64_t left = block_size - (begin & (block_size - 1));
    const int64_t run = left < n ? left : n;
    decode_run(of_type.entries, table, codes, begin, run, *absmax++, dst);
    begin += run;
    dst += run;
    n -= run;
  }
}

/// Codes of 16 values by binary search over the thresholds.
__m512i codes_of(__m512 thresholds, __m512i order, __m512 value) {
  const __m512 v = _mm512_max_ps(_mm512_min_ps(value, _mm512_set1_ps(1.0f)), _mm512_set1_ps(-1.0f));
  __m512i index = _mm512_setzero_si512();
  for (int step = 8; step > 0; step /= 2) {
    const __m512i probe = _mm512_add_epi32(index, _mm512_set1_epi32(step - 1));
    const __m512 threshold = _mm512_permutexvar_ps(probe, thresholds);
    const __mmask16 above = _mm512_cmp_ps_mask(threshold, v, _CMP_LT_OQ);
    index = _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(step));
  }
  return _mm512_permutexvar_epi32(index, order);
}

bool encode(const Bnb4Encoding& encoding, const float* src, int64_t block_size, uint8_t* codes,
            float* absmax) {
  const int32_t bits = largest_magnitude_bits(src, block_size);
  if (bits >= 0x7f800000) {
    return false;
  }
  std::memcpy(absmax, &bits, sizeof bits);
  const float least = 1e-38f;
  const __m512 inverse = _mm512_set1_ps(1.0f / (*absmax > least ? *absmax : least));
  const __m512 thresholds = _mm512_loadu_ps(encoding.thresholds);
  const __m512i order = _mm512_loadu_si512(encoding.order);
  for (int64_t i = 0; i < block_size; i += 16) {
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(src + i), inverse);
    const __m512i code = codes_of(thresholds, order, value);
    // The first code of a pair goes to the high nibble.
    const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i / 2), _mm512_cvtepi64_epi8(pairs));
  }
  return true;
}

/// 16 elements from 8 bytes: element i in lane 2 i, element 8 + i in lane 2 i + 1. Indices look at
/// their low 4 bits alone.
__m512 sixteen(__m512 table, const uint8_t* codes) {
  int64_t bytes;
  std::memcpy(&bytes, codes, sizeof bytes);
  const __m512i places =
      _mm512_setr_epi32(4, 4, 0, 0, 12, 12, 8, 8, 20, 20, 16, 16, 28, 28, 24, 24);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(bytes), places), table);
}

void dot(const Bnb4Table& of_type, const uint8_t* const* codes, const float* const* scales,
         int64_t groups, const float* x, float* out) {
  const __m512 table = _mm512_loadu_ps(of_type.entries);
  const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  const __m512i back = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                    _mm512_setzero_ps()};
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 column = _mm512_permutexvar_ps(order, _mm512_loadu_ps(x + 64 * g + 16 * i));
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m512 scale = _mm512_set1_ps(scales[r][g]);
        const __m512 w = _mm512_mul_ps(sixteen(table, codes[r] + 32 * g + 8 * i), scale);
        sums[r] = _mm512_fmadd_ps(w, column, sums[r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    out[r] = sum_of(_mm512_permutexvar_ps(back, sums[r]));
  }
}

}  // namespace

const Bnb4Path kBnb4Avx512 = {decode, encode, dot};

}  // namespace budwood::quant::kernels
