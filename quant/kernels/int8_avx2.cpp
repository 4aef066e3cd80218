#include <budwood/quant/kernels/int8_paths.h>
#include <budwood/quant/kernels/vectors_avx2.h>

namespace budwood::quant::kernels {
namespace {

__m128i sixteen_codes(const float* src, __m256 scale) {
  const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(src), scale));
  const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(src + 8), scale));
  return pack_bytes(first, second, true);
}

void encode(const float* src, float scale, int64_t n, int8_t* codes) {
  const __m256 scales = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), sixteen_codes(src + i, scales));
  }
  if (i < n) {
    float rest[16] = {};
    int8_t packed[16];
    std::memcpy(rest, src + i, static_cast<size_t>(n - i) * sizeof(float));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), sixteen_codes(rest, scales));
    std::memcpy(codes + i, packed, static_cast<size_t>(n - i));
  }
}

void decode(const int8_t* codes, float scb, float last, int64_t n, float* dst) {
  const __m256 scbs = _mm256_set1_ps(scb);
  const __m256 lasts = _mm256_set1_ps(last);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 scaled = _mm256_mul_ps(floats_of_i8(load_8_bytes(codes + i)), scbs);
    _mm256_storeu_ps(dst + i, _mm256_mul_ps(scaled, lasts));
  }
  for (; i < n; ++i) {
    dst[i] = static_cast<float>(codes[i]) * scb * last;
  }
}

}  // namespace

const Int8Path kInt8Avx2 = {largest_magnitude_bits, encode, decode};

}  // namespace budwood::quant::kernels
