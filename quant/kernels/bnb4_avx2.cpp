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

/// The entries' bytes, each plane in both lanes.
struct Planes {
  __m256i plane[4];
};

Planes load_planes(const Bnb4Table& table) {
  Planes all;
  for (int k = 0; k < 4; ++k) {
    all.plane[k] = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.planes[k])));
  }
  return all;
}

/// 32 elements from 16 bytes: one byte of each entry at a time, for all 32 together.
void thirty_two(const Planes& planes, const uint8_t* codes, __m256 scale, float* dst) {
  // Elements 0-3, 8-11, ... to the lower lane, 4-7, 12-15, ... to the upper one.
  const __m256i twice = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
                                         2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
  const __m256i bytes = _mm256_shuffle_epi8(
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))), twice);
  const __m256i index =
      _mm256_or_si256(_mm256_and_si256(bytes, _mm256_set1_epi16(0x0f00)),
                      _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi16(0x000f)));
  const __m256i b0 = _mm256_shuffle_epi8(planes.plane[0], index);
  const __m256i b1 = _mm256_shuffle_epi8(planes.plane[1], index);
  const __m256i b2 = _mm256_shuffle_epi8(planes.plane[2], index);
  const __m256i b3 = _mm256_shuffle_epi8(planes.plane[3], index);
  const __m256i low[] = {_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1)};
  const __m256i high[] = {_mm256_unpacklo_epi8(b2, b3), _mm256_unpackhi_epi8(b2, b3)};
  for (int half = 0; half < 2; ++half, dst += 16) {
    const __m256i first = _mm256_unpacklo_epi16(low[half], high[half]);
    const __m256i second = _mm256_unpackhi_epi16(low[half], high[half]);
    _mm256_storeu_ps(dst, _mm256_mul_ps(_mm256_castsi256_ps(first), scale));
    _mm256_storeu_ps(dst + 8, _mm256_mul_ps(_mm256_castsi256_ps(second), scale));
  }
}

/// n elements of one block from position begin.
void decode_run(const Bnb4Table& table, const Planes& planes, const uint8_t* codes, int64_t begin,
                int64_t n, float scale, float* dst) {
  const float* entries = table.entries;
  codes += begin / 2;
  if ((begin & 1) != 0 && n > 0) {
    *dst++ = entries[*codes++ & 15] * scale;
    --n;
  }
  const __m256 scales = _mm256_set1_ps(scale);
  for (; n >= 32; n -= 32, codes += 16, dst += 32) {
    thirty_two(planes, codes, scales, dst);
  }
  for (; n >= 8; n -= 8, codes += 4, dst += 8) {
    _mm256_storeu_ps(dst, _mm256_mul_ps(eight(load_table(entries), codes), scales));
  }
  for (; n > 0; n -= 2, ++codes, dst += 2) {
    dst[0] = entries[*codes >> 4] * scale;
    if (n > 1) {
      dst[1] = entries[*codes & 15] * scale;
    }
  }
}

void decode(const Bnb4Table& table, const uint8_t* codes, const float* absmax, int64_t block_size,
            int64_t begin, int64_t n, float* dst) {
  const Planes planes = load_planes(table);
  while (n > 0) {
    const int64_t left = block_size - (begin & (block_size - 1));
    const int64_t run = left < n ? left : n;
    decode_run(table, planes, codes, begin, run, *absmax++, dst);
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
