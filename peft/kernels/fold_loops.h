#pragma once

#include <budwood/peft/kernels/fold_paths.h>
#include <budwood/quant/kernels/half.h>

#include <cmath>
#include <cstring>
#if defined(__FMA__)
#include <immintrin.h>
#endif

// Multiplications and additions are fused where this text says so and nowhere else: the same bits
// on every instruction set.
namespace budwood::kernels {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kWide = 8;
#elif defined(__AVX2__)
constexpr int64_t kWide = 4;
#else
constexpr int64_t kWide = 2;
#endif
using Doubles = double __attribute__((vector_size(kWide * sizeof(double))));

inline Doubles load_wide(const double* src) {
  Doubles x;
  std::memcpy(&x, src, sizeof x);
  return x;
}

/// a b + c, rounded once.
inline double fused(double a, double b, double c) {
  return std::fma(a, b, c);
}
#if defined(__AVX512F__)
inline Doubles fused(double a, Doubles b, Doubles c) {
  return (Doubles)_mm512_fmadd_pd(_mm512_set1_pd(a), (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
inline Doubles fused(double a, Doubles b, Doubles c) {
  return (Doubles)_mm256_fmadd_pd(_mm256_set1_pd(a), (__m256d)b, (__m256d)c);
}
#else
inline Doubles fused(double a, Doubles b, Doubles c) {
  for (int64_t i = 0; i < kWide; ++i) c[i] = fused(a, b[i], c[i]);
  return c;
}
#endif

template <int kRows, int kVectors>
void add_columns(double* sums, int64_t stride, const double* left, const double* right,
                 int64_t rank) {
  Doubles sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load_wide(sums + r * stride + v * kWide);
  for (int64_t k = 0; k < rank; ++k) {
    Doubles factors[kVectors];
    for (int v = 0; v < kVectors; ++v) factors[v] = load_wide(right + k * kFoldColumns + v * kWide);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = fused(left[r * rank + k], factors[v], sum[r][v]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      std::memcpy(sums + r * stride + v * kWide, &sum[r][v], sizeof sum[r][v]);
}

template <int kRows>
void add_some_rows(double* sums, int64_t stride, int64_t cols, const double* left,
                   const double* right, int64_t rank) {
  constexpr int kVectors = 2;
  int64_t j = 0;
  for (; j + kVectors * kWide <= cols; j += kVectors * kWide)
    add_columns<kRows, kVectors>(sums + j, stride, left, right + j, rank);
  for (; j < cols; j += kWide) add_columns<kRows, 1>(sums + j, stride, left, right + j, rank);
}

void add_rows(double* sums, int64_t stride, int64_t rows, int64_t cols, const double* left,
              const double* right, int64_t rank) {
  constexpr int64_t kRows = 4;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    add_some_rows<kRows>(sums + i * stride, stride, cols, left + i * rank, right, rank);
  for (; i < rows; ++i)
    add_some_rows<1>(sums + i * stride, stride, cols, left + i * rank, right, rank);
}

void bf16_to_fp64(const uint16_t* src, double* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = quant::kernels::bf16_to_fp32(src[i]);
}

void fp32_to_fp64(const float* src, double* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = src[i];
}

inline bool is_finite(uint32_t bits) {
  return (bits & 0x7f800000u) != 0x7f800000u;
}

bool round_fp32(const double* src, float* dst, int64_t n) {
  uint32_t faults = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto rounded = static_cast<float>(src[i]);
    dst[i] = rounded;
    faults |= static_cast<uint32_t>(!is_finite(quant::kernels::float_bits(rounded)));
  }
  return faults == 0;
}

/// A float from which a shorter type is rounded as from the double itself: toward zero, with the
/// last bit set when something was cut off. Infinities are overflows already.
inline uint32_t to_odd(double value) {
  const auto near = static_cast<float>(value);
  const uint32_t bits = quant::kernels::float_bits(near);
  const double back = near;
  const bool exact = back == value || value != value;
  const bool away = (value < 0 ? -back : back) > (value < 0 ? -value : value);
  return exact ? bits : (bits - static_cast<uint32_t>(away)) | 1u;
}

using Singles = float __attribute__((vector_size(kWide * sizeof(float))));
using Words = uint32_t __attribute__((vector_size(kWide * sizeof(uint32_t))));
using Halves = uint16_t __attribute__((vector_size(kWide * sizeof(uint16_t))));

/// to_odd of each lane.
inline Words to_odd(Doubles value) {
  const Singles near = __builtin_convertvector(value, Singles);
  const Doubles back = __builtin_convertvector(near, Doubles);
  Words bits;
  std::memcpy(&bits, &near, sizeof bits);
  const auto cut = (back != value) & (value == value);
  const auto away = (value < 0 ? -back : back) > (value < 0 ? -value : value);
  // Masks are -1 where true.
  const Words cut_off = __builtin_convertvector(cut, Words);
  const Words too_far = __builtin_convertvector(cut & away, Words);
  return (bits + too_far) | (cut_off & 1u);
}

// Any numbers.
bool round_all_bf16(const double* src, uint16_t* dst, int64_t n) {
  Words faults = {};
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    const Words bits = to_odd(load_wide(src + i));
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words overflow = (rounded & 0x7f80u) == 0x7f80u;
    const Words infinite = (bits & 0x7f800000u) == 0x7f800000u;
    faults |= overflow | infinite;
    const Halves halves = __builtin_convertvector(rounded, Halves);
    std::memcpy(dst + i, &halves, sizeof halves);
  }
  uint32_t fault = 0;
  for (int64_t j = 0; j < kWide; ++j) fault |= faults[j];
  for (; i < n; ++i) {
    const uint32_t bits = to_odd(src[i]);
    dst[i] = quant::kernels::fp32_to_bf16(quant::kernels::float_from_bits(bits));
    fault |= static_cast<uint32_t>(!is_finite(bits) || !is_finite(uint32_t{dst[i]} << 16));
  }
  return fault == 0;
}

using Longs = uint64_t __attribute__((vector_size(kWide * sizeof(uint64_t))));
constexpr int64_t kRoundedBlock = 64;

// A block of normal numbers of bfloat16 that are not its largest, straight from the bits of the
// doubles. False, and dst of no use, when some number is another.
bool round_normal_bf16(const double* src, uint16_t* dst) {
  constexpr uint64_t kFirst = 1023 - 126, kLast = 1023 + 126;  // biased exponents
  Longs other = {};
  for (int64_t i = 0; i < kRoundedBlock; i += kWide) {
    Longs bits;
    std::memcpy(&bits, src + i, sizeof bits);
    const Longs magnitude = bits & 0x7fffffffffffffffu;
    // Negative as signed numbers where the exponent is out of range.
    other |= (magnitude - (kFirst << 52)) | (((kLast + 1) << 52) - 1 - magnitude);
    const Longs rounded = (magnitude + 0xfffffffffffu + ((magnitude >> 45) & 1u)) >> 45;
    const Longs shorter = (rounded - ((1023u - 127u) << 7)) | ((bits >> 48) & 0x8000u);
    const Halves halves = __builtin_convertvector(shorter, Halves);
    std::memcpy(dst + i, &halves, sizeof halves);
  }
  uint64_t any = 0;
  for (int64_t j = 0; j < kWide; ++j) any |= other[j];
  return any >> 63 == 0;
}

bool round_bf16(const double* src, uint16_t* dst, int64_t n) {
  bool finite = true;
  int64_t i = 0;
  for (; i + kRoundedBlock <= n; i += kRoundedBlock)
    if (!round_normal_bf16(src + i, dst + i))
      finite &= round_all_bf16(src + i, dst + i, kRoundedBlock);
  return finite & round_all_bf16(src + i, dst + i, n - i);
}

void round_to_odd(const double* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = quant::kernels::float_from_bits(to_odd(src[i]));
}

void add_sums(const double* before, const double* after, const double* written, int64_t n,
              double (*sums)[kFoldChains]) {
  constexpr int kVectors = kFoldChains / kWide;
  Doubles weight[kVectors] = {}, delta[kVectors] = {}, left[kVectors] = {}, error[kVectors] = {};
  for (int64_t i = 0; i < n; i += kFoldChains)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * kWide;
      const Doubles w = load_wide(before + at), now = load_wide(after + at);
      const Doubles r = load_wide(written + at);
      const Doubles change = now - w, missed = r - now;
      weight[v] += w * w;
      delta[v] += change * change;
      left[v] += (r - w) * change;
      error[v] += missed * missed;
    }
  const Doubles* const all[] = {weight, delta, left, error};
  for (int s = 0; s < 4; ++s)
    for (int v = 0; v < kVectors; ++v)
      for (int64_t l = 0; l < kWide; ++l) sums[s][v * kWide + l] += all[s][v][l];
}

constexpr FoldPath kFoldPath = {add_rows,   bf16_to_fp64, fp32_to_fp64, round_fp32,
                                round_bf16, round_to_odd, add_sums};

}  // namespace
}  // namespace budwood::kernels
