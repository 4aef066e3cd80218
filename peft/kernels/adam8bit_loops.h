#pragma once

#include <budwood/peft/kernels/adam8bit_paths.h>

#include <algorithm>
#include <cmath>

namespace budwood::kernels {
namespace {

void update(const Adam8bitStep& s, int64_t n, float* __restrict p, const float* __restrict g,
            float* __restrict m, float* __restrict v, float* most_m, float* most_v) {
  const float keep1 = 1.0f - s.beta1, keep2 = 1.0f - s.beta2, scale = 1.0f / s.correction2;
  constexpr int64_t kChains = 16;
  float high_m[kChains] = {}, high_v[kChains] = {};
  const auto element = [&](int64_t i, int64_t chain) {
    m[i] = s.beta1 * m[i] + keep1 * g[i];
    v[i] = s.beta2 * v[i] + keep2 * (g[i] * g[i]);
    p[i] = p[i] * s.decay - s.rate * (m[i] / (std::sqrt(v[i]) * scale + s.eps));
    high_m[chain] = std::max(high_m[chain], std::abs(m[i]));
    high_v[chain] = std::max(high_v[chain], v[i]);
  };
  int64_t i = 0;
  for (; i + kChains <= n; i += kChains)
    for (int64_t c = 0; c < kChains; ++c) element(i + c, c);
  for (; i < n; ++i) element(i, 0);
  *most_m = *std::max_element(high_m, high_m + kChains);
  *most_v = *std::max_element(high_v, high_v + kChains);
}

constexpr Adam8bitPath kAdam8bitPath = {.update = update};

}  // namespace
}  // namespace budwood::kernels
