#include <budwood/quant/kernels/affine_paths.h>
#include <budwood/quant/kernels/vectors_avx2.h>

namespace budwood::quant::kernels {
namespace {

void store(__m256i codes, __m256 scale, __m256 zero, float* dst) {
  _mm256_storeu_ps(dst, _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(codes), zero), scale));
}

void decode_4(const uint8_t* row, int64_t begin, int64_t n, float scale, float zero, float* dst) {
  const uint8_t* codes = row + begin / 2;
  if ((begin & 1) != 0 && n > 0) {
    *dst++ = (static_cast<float>(*codes++ >> 4) - zero) * scale;
    --n;
  }
  const __m256 scales = _mm256_set1_ps(scale);
  const __m256 zeros = _mm256_set1_ps(zero);
  const __m256i places = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i nibble = _mm256_set1_epi32(15);
  for (; n >= 8; n -= 8, codes += 4, dst += 8) {
    int32_t bytes;
    std::memcpy(&bytes, codes, sizeof bytes);
    const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), places);
    store(_mm256_and_si256(shifted, nibble), scales, zeros, dst);
  }
  for (; n > 0; n -= 2, ++codes, dst += 2) {
    dst[0] = (static_cast<float>(*codes & 15) - zero) * scale;
    if (n > 1) {
      dst[1] = (static_cast<float>(*codes >> 4) - zero) * scale;
    }
  }
}

void decode_8(const uint8_t* row, int64_t begin, int64_t n, float scale, float zero, float* dst) {
  const uint8_t* codes = row + begin;
  const __m256 scales = _mm256_set1_ps(scale);
  const __m256 zeros = _mm256_set1_ps(zero);
  for (; n >= 8; n -= 8, codes += 8, dst += 8) {
    store(_mm256_cvtepu8_epi32(load_8_bytes(codes)), scales, zeros, dst);
  }
  for (; n > 0; --n) {
    *dst++ = (static_cast<float>(*codes++) - zero) * scale;
  }
}

bool range(const float* src, int64_t n, float* least, float* most) {
  __m256 low = _mm256_setzero_ps();
  __m256 high = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_loadu_ps(src + i);
    low = _mm256_min_ps(low, x);
    high = _mm256_max_ps(high, x);
  }
  float rest[8] = {};
  std::memcpy(rest, src + i, static_cast<size_t>(n - i) * sizeof(float));
  float lows[8];
  float highs[8];
  _mm256_storeu_ps(lows, _mm256_min_ps(low, _mm256_loadu_ps(rest)));
  _mm256_storeu_ps(highs, _mm256_max_ps(high, _mm256_loadu_ps(rest)));
  *least = lows[0];
  *most = highs[0];
  for (int k = 1; k < 8; ++k) {
    *least = lows[k] < *least ? lows[k] : *least;
    *most = highs[k] > *most ? highs[k] : *most;
  }
  return largest_magnitude_bits(src, n) < 0x7f800000;
}

__m256i eight_codes(const float* src, __m256 scale, __m256i zero, __m256i top) {
  const __m256i steps = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(src), scale));
  const __m256i q = _mm256_add_epi32(steps, zero);
  return _mm256_min_epi32(_mm256_max_epi32(q, _mm256_setzero_si256()), top);
}

void encode(const float* src, int64_t n, float scale, int32_t zero, int32_t top, uint8_t* dst) {
  const __m256 scales = _mm256_set1_ps(scale);
  const __m256i zeros = _mm256_set1_epi32(zero);
  const __m256i tops = _mm256_set1_epi32(top);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i first = eight_codes(src + i, scales, zeros, tops);
    const __m256i second = eight_codes(src + i + 8, scales, zeros, tops);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), pack_bytes(first, second, false));
  }
  if (i < n) {
    float rest[16] = {};
    uint8_t codes[16];
    std::memcpy(rest, src + i, static_cast<size_t>(n - i) * sizeof(float));
    const __m256i first = eight_codes(rest, scales, zeros, tops);
    const __m256i second = eight_codes(rest + 8, scales, zeros, tops);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), pack_bytes(first, second, false));
    std::memcpy(dst + i, codes, static_cast<size_t>(n - i));
  }
}

}  // namespace

const AffinePath kAffineAvx2 = {decode_4, decode_8};
const AffineEncoder kAffineEncodeAvx2 = {range, encode};

}  // namespace budwood::quant::kernels
