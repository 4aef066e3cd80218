#include <budwood/peft/kernels/rows.h>

#include <functional>

#include "kernel_cases.h"

using namespace budwood::kernels;
using namespace kernel_cases;

namespace {

constexpr int64_t kRowsOfX = 37;
constexpr float kEps = 1e-5f;

FloatRows rows(const std::vector<float>& x, int64_t n) {
  return {x.data(), FloatType::fp32, n};
}
MutableFloatRows rows(std::vector<float>& x, int64_t n) {
  return {x.data(), FloatType::fp32, n};
}

double gate_value(Gate gate, double x) {
  if (gate == Gate::silu) return x / (1 + std::exp(-x));
  if (gate == Gate::gelu) return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

// dx of sum(dy ∘ f(x)) for one row, by central differences in float64.
std::vector<double> differences(
    std::vector<double> x, const std::vector<double>& dy,
    const std::function<std::vector<double>(const std::vector<double>&)>& f) {
  std::vector<double> dx;
  for (auto& value : x) {
    const double old = value, step = 1e-5;
    double change = 0;
    for (const double side : {1.0, -1.0}) {
      value = old + side * step;
      const auto y = f(x);
      for (size_t i = 0; i < y.size(); ++i) change += side * dy[i] * y[i];
    }
    value = old;
    dx.push_back(change / (2 * step));
  }
  return dx;
}

std::vector<double> normed(const std::vector<double>& x, const std::vector<double>& w,
                           const std::vector<double>* b) {
  const auto n = static_cast<double>(x.size());
  double mean = 0, square = 0;
  for (const double v : x) mean += v / n;
  if (b == nullptr) mean = 0;
  for (const double v : x) square += (v - mean) * (v - mean) / n;
  std::vector<double> y;
  for (size_t i = 0; i < x.size(); ++i)
    y.push_back((x[i] - mean) / std::sqrt(square + double{kEps}) * w[i] + (b ? (*b)[i] : 0.0));
  return y;
}

std::vector<double> doubles(const std::vector<float>& x, int64_t begin = 0, int64_t n = -1) {
  return {x.begin() + begin, n < 0 ? x.end() : x.begin() + begin + n};
}

void append(std::vector<double>& to, const std::vector<double>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

TEST_CASE("norms and their gradients equal float64") {
  for (const bool centred : {false, true})
    for (const int64_t n : {1, 7, 16, 100, 576}) {
      const int64_t m = n > 100 ? 3 : kRowsOfX;
      const auto x = normal_floats(m * n, 1, 2.0f), w = normal_floats(n, 2),
                 b = normal_floats(n, 3), dy = normal_floats(m * n, 4);
      const auto weight = doubles(w), bias = doubles(b);
      const auto f = [&](const std::vector<double>& row) {
        return normed(row, weight, centred ? &bias : nullptr);
      };
      std::vector<double> y, dx, dw(static_cast<size_t>(n)), db(static_cast<size_t>(n));
      for (int64_t r = 0; r < m; ++r) {
        const auto row = doubles(x, r * n, n), grad = doubles(dy, r * n, n);
        append(y, f(row));
        append(dx, differences(row, grad, f));
        const std::vector<double> ones(weight.size(), 1.0), zeros(weight.size(), 0.0);
        const auto plain = normed(row, ones, centred ? &zeros : nullptr);
        for (size_t i = 0; i < plain.size(); ++i) {
          dw[i] += grad[i] * plain[i];
          db[i] += grad[i];
        }
      }
      on_each_isa([&] {
        CAPTURE(n);
        CAPTURE(centred);
        for (const int threads : {1, 3}) {
          std::vector<float> found(x.size()), gx(x.size()), gw(w.size()), gb(w.size());
          const auto t = threads_of(threads);
          if (centred) {
            layer_norm(rows(x, n), m, n, w.data(), b.data(), kEps, rows(found, n), t);
            layer_norm_backward(rows(dy, n), rows(x, n), m, n, w.data(), kEps, rows(gx, n),
                                gw.data(), gb.data(), t);
            CHECK(distance(gb, db) < 1e-5);
          } else {
            rms_norm(rows(x, n), m, n, w.data(), kEps, rows(found, n), t);
            rms_norm_backward(rows(dy, n), rows(x, n), m, n, w.data(), kEps, rows(gx, n), gw.data(),
                              t);
          }
          CHECK(distance(found, y) < 2e-6);
          // One column: the gradient is a difference of equal terms.
          CHECK(distance(gx, dx) < (n == 1 ? 1e30 : 1e-5));
          CHECK(distance(gw, dw) < (n == 1 && centred ? 1e30 : 1e-5));
          auto in_place = dy;
          if (!centred) {
            rms_norm_backward(rows(dy, n), rows(x, n), m, n, w.data(), kEps, rows(in_place, n),
                              nullptr, t);
            CHECK(in_place == gx);
          }
        }
      });
    }
}

TEST_CASE("gated activations and their gradients equal float64") {
  const int64_t m = 5, n = 37;
  const auto g = normal_floats(m * n, 1, 3.0f), u = normal_floats(m * n, 2),
             dy = normal_floats(m * n, 3);
  for (const Gate gate : {Gate::silu, Gate::gelu, Gate::gelu_tanh}) {
    std::vector<double> y, dg, du;
    for (size_t i = 0; i < g.size(); ++i) {
      const double x = double{g[i]}, step = 1e-5;
      const double slope = (gate_value(gate, x + step) - gate_value(gate, x - step)) / (2 * step);
      y.push_back(gate_value(gate, x) * double{u[i]});
      dg.push_back(double{dy[i]} * double{u[i]} * slope);
      du.push_back(double{dy[i]} * gate_value(gate, x));
    }
    on_each_isa([&] {
      std::vector<float> found(g.size()), to_g(g.size()), to_u(g.size());
      gated(gate, rows(g, n), rows(u, n), m, n, rows(found, n), threads_of(2));
      gated_backward(gate, rows(dy, n), rows(g, n), rows(u, n), m, n, rows(to_g, n), rows(to_u, n),
                     threads_of(2));
      CHECK(distance(found, y) < 2e-6);
      CHECK(distance(to_g, dg) < 2e-6);
      CHECK(distance(to_u, du) < 2e-6);
    });
  }
}

TEST_CASE("large, infinite and NaN gates do not hang or overflow") {
  const std::vector<float> g = {1e4f, -1e4f, 90.0f, -90.0f, std::nanf(""), 0.0f};
  const std::vector<float> u(6, 1.0f);
  for (const Gate gate : {Gate::silu, Gate::gelu, Gate::gelu_tanh})
    on_each_isa([&] {
      std::vector<float> y(6);
      gated(gate, rows(g, 6), rows(u, 6), 1, 6, rows(y, 6), {});
      CHECK(y[0] == 1e4f);
      CHECK(y[1] == 0.0f);
      CHECK(y[2] == 90.0f);
      CHECK(std::abs(y[3]) < 1e-30f);
      CHECK(std::isnan(y[4]));
      CHECK(y[5] == 0.0f);
    });
}

TEST_CASE("a rotation turns pairs, copies the rest and is undone") {
  const int64_t m = 19, heads = 3;
  for (const auto& [d, width] : {std::pair<int64_t, int64_t>{64, 64}, {10, 6}, {2, 2}, {20, 20}}) {
    const int64_t n = heads * d, half = width / 2;
    const auto x = normal_floats(m * n, 1), angles = normal_floats(m * half, 2);
    std::vector<float> cos, sin;
    for (const float a : angles) {
      cos.push_back(std::cos(a));
      sin.push_back(std::sin(a));
    }
    auto wanted = doubles(x);
    for (int64_t t = 0; t < m; ++t)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < half; ++i) {
          double* at = wanted.data() + t * n + h * d + i;
          const double a = at[0], b = at[half];
          const double c = double{cos[static_cast<size_t>(t * half + i)]};
          const double s = double{sin[static_cast<size_t>(t * half + i)]};
          at[0] = a * c - b * s;
          at[half] = b * c + a * s;
        }
    on_each_isa([&] {
      std::vector<float> y(x.size()), back(x.size());
      rotate(rows(x, n), m, heads, d, width, cos.data(), sin.data(), false, rows(y, n),
             threads_of(2));
      CHECK(distance(y, wanted) < 1e-6);
      rotate(rows(std::as_const(y), n), m, heads, d, width, cos.data(), sin.data(), true,
             rows(back, n), {});
      CHECK(distance(back, doubles(x)) < 1e-6);
      auto in_place = x;
      rotate(rows(x, n), m, heads, d, width, cos.data(), sin.data(), false, rows(in_place, n), {});
      CHECK(in_place == y);
    });
  }
}

TEST_CASE("sums of products of rows are float64's, the same with any number of threads") {
  for (const int64_t m : {0, 1, 16, 37, 300})
    for (const int64_t n : {1, 9, 70}) {
      const auto a = normal_floats(m * n, 1), b = normal_floats(m * n, 2);
      std::vector<double> wanted(static_cast<size_t>(n));
      for (int64_t i = 0; i < m * n; ++i)
        wanted[static_cast<size_t>(i % n)] +=
            double{a[static_cast<size_t>(i)]} * double{b[static_cast<size_t>(i)]};
      on_each_isa([&] {
        std::vector<float> one(wanted.size(), 5.0f), four(wanted.size());
        sum_products(rows(a, n), rows(b, n), m, n, one.data(), {});
        sum_products(rows(a, n), rows(b, n), m, n, four.data(), threads_of(4));
        CHECK(distance(one, wanted, 1.0) < 1e-5);
        CHECK(one == four);
      });
    }
}

TEST_CASE("16-bit rows: the normed values are rounded before the weight, as transformers does") {
  const int64_t n = 48;
  const auto x = normal_floats(2 * n, 1), w = normal_floats(n, 2);
  std::vector<uint16_t> half(x.size()), y(x.size());
  budwood::quant::kernels::fp32_to_bf16(x.data(), half.data(), 2 * n);
  rms_norm({half.data(), FloatType::bf16, n}, 2, n, w.data(), kEps, {y.data(), FloatType::bf16, n},
           {});
  for (int64_t r = 0; r < 2; ++r) {
    float square = 0;
    std::vector<float> row(static_cast<size_t>(n));
    budwood::quant::kernels::bf16_to_fp32(half.data() + r * n, row.data(), n);
    for (const float v : row) square += v * v;
    for (size_t i = 0; i < row.size(); ++i) {
      const float plain = row[i] / std::sqrt(square / static_cast<float>(n) + kEps);
      using budwood::quant::kernels::bf16_to_fp32;
      using budwood::quant::kernels::fp32_to_bf16;
      const float rounded = bf16_to_fp32(fp32_to_bf16(plain));
      CHECK(bf16_to_fp32(y[static_cast<size_t>(r * n) + i]) ==
            doctest::Approx(bf16_to_fp32(fp32_to_bf16(rounded * w[i]))).epsilon(0.01));
    }
  }
}
