#pragma once

#include <budwood/peft/kernels/noise_paths.h>

#include <bit>
#include <cmath>

// Plain arithmetic on arrays, which compilers make wide; never fused.
namespace budwood::kernels {
namespace {

constexpr int64_t kLanes = kNoiseCounters;

struct Words {
  alignas(64) uint32_t w[4][kLanes];
};

inline void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = uint64_t{a} * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

inline void philox_rounds(Words& x, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    for (int64_t i = 0; i < kLanes; ++i) {
      uint32_t high0, low0, high1, low1;
      multiply(0xD2511F53u, x.w[0][i], high0, low0);
      multiply(0xCD9E8D57u, x.w[2][i], high1, low1);
      const uint32_t second = x.w[1][i], fourth = x.w[3][i];
      x.w[0][i] = high1 ^ second ^ key0;
      x.w[1][i] = low1;
      x.w[2][i] = high0 ^ fourth ^ key1;
      x.w[3][i] = low0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// -2 ln u for u = (k + 1/2) / 2^23: u = m 2^e with m around 1, ln m by the series of artanh.
inline float minus_two_log(uint32_t k) {
  const float u = (static_cast<float>(static_cast<int32_t>(k)) + 0.5f) * 0x1p-23f;
  const auto bits = std::bit_cast<uint32_t>(u);
  const uint32_t above = (bits & 0x7fffffu) > 0x3504f3u ? 1u : 0u;  // m > sqrt 2
  const auto exponent = static_cast<float>(static_cast<int32_t>((bits >> 23) - 127u + above));
  const float m = std::bit_cast<float>((bits & 0x7fffffu) | ((127u - above) << 23));
  const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
  const float series =
      s * (2.0f + q * (0.666666667f + q * (0.4f + q * (0.285714286f + q * 0.222222222f))));
  return -2.0f * (exponent * 0.693147181f + series);
}

// Sine and cosine of a turn's part (k + 1/2) / 2^23, by the nearest quarter and series.
inline void sine_cosine(uint32_t k, float& sine, float& cosine) {
  const float quarters = (static_cast<float>(static_cast<int32_t>(k)) + 0.5f) * 0x1p-21f;
  const auto nearest = static_cast<int32_t>(quarters + 0.5f);
  const float x = (quarters - static_cast<float>(nearest)) * 1.57079633f, q = x * x;
  const float s =
      x * (1.0f +
           q * (-0.166666667f + q * (8.33333333e-3f + q * (-1.98412698e-4f + q * 2.75573192e-6f))));
  const float c =
      1.0f + q * (-0.5f + q * (4.16666667e-2f + q * (-1.38888889e-3f + q * 2.48015873e-5f)));
  const bool odd = (nearest & 1) != 0;
  const float sine_here = odd ? c : s, cosine_here = odd ? s : c;
  sine = (nearest & 2) != 0 ? -sine_here : sine_here;
  cosine = ((nearest + 1) & 2) != 0 ? -cosine_here : cosine_here;
}

void normal_block(const NoiseKey& key, uint64_t first, float* z) {
  Words x;
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint64_t counter = first + static_cast<uint64_t>(i);
    x.w[0][i] = static_cast<uint32_t>(counter);
    x.w[1][i] = static_cast<uint32_t>(counter >> 32);
    x.w[2][i] = key.stream;
    x.w[3][i] = key.step;
  }
  philox_rounds(x, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
  alignas(64) float numbers[4][kLanes];
  for (int pair = 0; pair < 4; pair += 2)
    for (int64_t i = 0; i < kLanes; ++i) {
      const float length = std::sqrt(minus_two_log(x.w[pair][i] >> 9));
      float sine, cosine;
      sine_cosine(x.w[pair + 1][i] >> 9, sine, cosine);
      numbers[pair][i] = length * cosine;
      numbers[pair + 1][i] = length * sine;
    }
  for (int64_t i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) z[4 * i + j] = numbers[j][i];
}

constexpr NoisePath kNoisePath = {.normal = normal_block};

}  // namespace
}  // namespace budwood::kernels
