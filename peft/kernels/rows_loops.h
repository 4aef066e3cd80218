#pragma once

#include <budwood/peft/kernels/lanes.h>
#include <budwood/peft/kernels/rows_paths.h>

#include <cmath>

/// The text of the inner loops of rows.h, for the instruction set of the source that includes it.
namespace budwood::kernels {
namespace {

/// body(i, count): kLanes elements from i at a time, then what is left.
template <class Body>
inline void by_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}
inline Floats load_at(const float* src, int64_t i, int64_t count) {
  return count == kLanes ? load(src + i) : load_first(src + i, count);
}
inline void store_at(float* dst, int64_t i, int64_t count, Floats x) {
  if (count == kLanes) {
    store(dst + i, x);
  } else {
    store_first(dst + i, x, count);
  }
}

/// Four chains of sums of term(i, count), which is 0 in lanes beyond count.
template <class Term>
inline float sum_of(int64_t n, const Term& term) {
  Floats chains[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int c = 0; c < 4; ++c) chains[c] += term(i + c * kLanes, int64_t{kLanes});
  by_lanes(n - i, [&](int64_t j, int64_t count) { chains[0] += term(i + j, count); });
  return sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

float dot_row(const float* a, const float* b, int64_t n) {
  return sum_of(
      n, [=](int64_t i, int64_t count) { return load_at(a, i, count) * load_at(b, i, count); });
}

float sum_row(const float* a, int64_t n) {
  return sum_of(n, [=](int64_t i, int64_t count) { return load_at(a, i, count); });
}

float square_deviation_row(const float* a, float mean, int64_t n) {
  return sum_of(n, [=](int64_t i, int64_t count) {
    Floats d = load_at(a, i, count) - mean;
    if (count < kLanes) d = counting() < static_cast<int32_t>(count) ? d : all(0.0f);
    return d * d;
  });
}

void affine_row(const float* a, float shift, float scale, int64_t n, float* y) {
  by_lanes(n, [=](int64_t i, int64_t count) {
    store_at(y, i, count, (load_at(a, i, count) - shift) * scale);
  });
}

void times_row(const float* a, const float* w, const float* b, int64_t n, float* y) {
  by_lanes(n, [=](int64_t i, int64_t count) {
    Floats x = load_at(a, i, count) * load_at(w, i, count);
    if (b != nullptr) x += load_at(b, i, count);
    store_at(y, i, count, x);
  });
}

void combine_rows(const float* a, float s, const float* b, float t, float u, int64_t n, float* y) {
  by_lanes(n, [=](int64_t i, int64_t count) {
    store_at(y, i, count, load_at(a, i, count) * s - load_at(b, i, count) * t - u);
  });
}

void add_row(const float* a, int64_t n, float* to) {
  by_lanes(n, [=](int64_t i, int64_t count) {
    store_at(to, i, count, load_at(to, i, count) + load_at(a, i, count));
  });
}

struct GateValue {
  Floats value, slope;
};

inline Floats each(Floats x, float (*function)(float)) {
  for (int i = 0; i < kLanes; ++i) x[i] = function(x[i]);
  return x;
}

inline GateValue silu(Floats x) {
  const Floats s = sigmoid(x);
  return {x * s, s * (1.0f + x * (1.0f - s))};
}

inline GateValue gelu(Floats x) {
  const Floats phi = 0.5f * (1.0f + each(x * 0.70710678f, [](float v) { return std::erf(v); }));
  return {x * phi, phi + x * 0.39894228f * exp(-0.5f * x * x)};
}

inline GateValue gelu_tanh(Floats x) {
  const Floats inner = 0.79788456f * (x + 0.044715f * x * x * x);
  // (1 + tanh(v)) / 2 = sigmoid(2 v)
  const Floats s = sigmoid(2.0f * inner);
  const Floats slope = 0.79788456f * (1.0f + 0.134145f * x * x);
  return {x * s, s + x * 2.0f * s * (1.0f - s) * slope};
}

inline GateValue gate_of(Gate gate, Floats x) {
  switch (gate) {
    case Gate::gelu:
      return gelu(x);
    case Gate::gelu_tanh:
      return gelu_tanh(x);
    default:
      return silu(x);
  }
}

void gated_row(Gate gate, const float* g, const float* u, int64_t n, float* y) {
  by_lanes(n, [=](int64_t i, int64_t count) {
    store_at(y, i, count, gate_of(gate, load_at(g, i, count)).value * load_at(u, i, count));
  });
}

void gated_backward_row(Gate gate, const float* grad, const float* g, const float* u, int64_t n,
                        float* dg, float* du) {
  by_lanes(n, [=](int64_t i, int64_t count) {
    const GateValue f = gate_of(gate, load_at(g, i, count));
    const Floats d = load_at(grad, i, count), up = load_at(u, i, count);
    store_at(dg, i, count, d * up * f.slope);
    store_at(du, i, count, d * f.value);
  });
}

void rotate_head(const float* x, const float* cos, const float* sin, float sign, int64_t half,
                 float* y) {
  by_lanes(half, [=](int64_t i, int64_t count) {
    const Floats a = load_at(x, i, count), b = load_at(x + half, i, count);
    const Floats c = load_at(cos, i, count), s = load_at(sin, i, count) * sign;
    store_at(y, i, count, a * c - b * s);
    store_at(y + half, i, count, b * c + a * s);
  });
}

constexpr RowsPath kRowsPath = {
    dot_row, sum_row,   square_deviation_row, affine_row, times_row, combine_rows,
    add_row, gated_row, gated_backward_row,   rotate_head};

}  // namespace
}  // namespace budwood::kernels
