#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

/// Vectors of floats as wide as the instruction set a source is compiled for, so that one text of a
/// loop serves them all. Everything has internal linkage: a function compiled here with AVX-512
/// must not be picked by the linker for machines that lack it.
namespace budwood::kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline Floats load(const float* src) {
  Floats x;
  std::memcpy(&x, src, sizeof x);
  return x;
}
inline void store(float* dst, Floats x) {
  std::memcpy(dst, &x, sizeof x);
}
/// The first n lanes; the others are 0.
inline Floats load_first(const float* src, int64_t n) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = src[i];
  return load(lanes);
}
inline void store_first(float* dst, Floats x, int64_t n) {
  float lanes[kLanes];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) dst[i] = lanes[i];
}

inline Floats all(float x) {
  return x - Floats{};
}
inline Ints all(int32_t x) {
  return x - Ints{};
}
/// 0, 1, 2, ...
inline Ints counting() {
  Ints x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

inline Floats larger(Floats a, Floats b) {
  return a > b ? a : b;
}

/// The sum of the lanes, halves first.
inline float sum(Floats x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
inline float largest(Floats x) {
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

/// e^x to 2 units in the last place; 0 below -87.3, infinity above 88.37, NaN for NaN.
inline Floats exp(Floats x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the sum's lowest bits are the integer
  const Floats shifted = x * 1.44269504f + kShift;
  const Floats n = shifted - kShift;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &bits, sizeof scale);
  Floats y = p * scale;
  y = x < -87.3f ? all(0.0f) : y;
  return x > 88.37f ? all(kInfinity) : y;
}

inline Floats sigmoid(Floats x) {
  return 1.0f / (1.0f + exp(-x));
}

}  // namespace
}  // namespace budwood::kernels
