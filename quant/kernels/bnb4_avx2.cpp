#include <budwood/quant/kernels/bnb4_paths.h>
#include <budwood/quant/kernels/vectors_avx2.h>

namespace budwood::quant::kernels {
namespace {

/// A table of 16 dwords in two registers.
struct Table {
  __m256i lower;
  __m256i upper;
};

Table load_table(const void* entries) {
  const auto* vectors = static_cast<const __m256i*>(entries);
  return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
}

/// Entries by the low 4 bits of each index; what lies above is ignored.
__m256 look_up(const Table& table, __m256i index) {
  const __m256i lower = _mm256_permutevar8x32_epi32(table.lower, index);
  const __m256i upper = _mm256_permutevar8x32_epi32(table.upper, index);
  const __m256 bit_3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_castsi256_ps(lower), _mm256_castsi256_ps(upper), bit_3);
}

/// Eight elements from four bytes, high nibbles first.
__m256 eight(const Table& table, const uint8_t* codes) {
  int32_t bytes;
  std::memcpy(&bytes, codes, sizeof bytes);
  const __m256i places = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  return look_up(table, _mm256_srlv_epi32(_mm256_set1_epi32(bytes), places));
}

/// n elements of one block from position begin.
void decode_run(const float* entries, const Table& table, const uint8_t* codes, int64_t begin,
                int64_t n, float scale, float* dst) {
  codes += begin / 2;
  if ((begin & 1) != 0 && n > 0) {
    *dst++ = entries[*codes++ & 15] * scale;
    --n;
  }
  const __m256 scales = _mm256_set1_ps(scale);
  for (; n >= 8; n -= 8, codes += 4, dst += 8) {
    _mm256_storeu_ps(dst, _mm256_mul_ps(eight(table, codes), scales));
  }
  for (; n > 0; n -= 2, ++codes, dst += 2) {
    dst[0] = entries[*codes >> 4] * scale;
    if (n > 1) {
      dst[1] = entries[*codes & 15] * scale;
    }
  }
}

void decode(const float* entries, const uint8_t* codes, const float* absmax, int64_t block_size,
            int64_t begin, int64_t n, float* dst) {
  const Table table = load_table(entries);
  while (n > 0) {
    const int64_t left = block_size - begin % block_size;
    const int64_t run = left < n ? left : n;
    decode_run(entries, table, codes, begin, run, *absmax++, dst);
    begin += run;
    dst += run;
    n -= run;
  }
}

/// Codes of 8 values.
__m256i codes_of(const __m256* thresholds, const Table& order, __m256 value) {
  const __m256 v = _mm256_max_ps(_mm256_min_ps(value, _mm256_set1_ps(1.0f)), _mm256_set1_ps(-1.0f));
  __m256i index = _mm256_setzero_si256();
  for (int t = 0; t < 15; ++t) {
    const __m256 below = _mm256_cmp_ps(thresholds[t], v, _CMP_LT_OQ);
    index = _mm256_sub_epi32(index, _mm256_castps_si256(below));
  }
  return _mm256_castps_si256(look_up(order, index));
}

/// Pairs of codes, first one high: 8 dwords to 4 bytes.
void store_pairs(__m256i codes, uint8_t* dst) {
  const __m256i pairs = _mm256_or_si256(_mm256_slli_epi64(codes, 4), _mm256_srli_epi64(codes, 32));
  const __m256i low_byte =
      _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 8, -1, -1,
                       -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(pairs, low_byte);
  const __m128i both =
      _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  const int32_t four = _mm_cvtsi128_si32(both);
  std::memcpy(dst, &four, sizeof four);
}

bool encode(const Bnb4Encoding& encoding, const float* src, int64_t block_size, uint8_t* codes,
            float* absmax) {
  const int32_t bits = largest_magnitude_bits(src, block_size);
  if (bits >= 0x7f800000) {
    return false;
  }
  std::memcpy(absmax, &bits, sizeof bits);
  const float least = 1e-38f;
  const __m256 inverse = _mm256_set1_ps(1.0f / (*absmax > least ? *absmax : least));
  const Table order = load_table(encoding.order);
  __m256 thresholds[15];
  for (int t = 0; t < 15; ++t) {
    thresholds[t] = _mm256_set1_ps(encoding.thresholds[t]);
  }
  for (int64_t i = 0; i < block_size; i += 8) {
    const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(src + i), inverse);
    store_pairs(codes_of(thresholds, order, value), codes + i / 2);
  }
  return true;
}

}  // namespace

const Bnb4Path kBnb4Avx2 = {decode, encode, nullptr};

}  // namespace budwood::quant::kernels
