#include <budwood/peft/kernels/fold.h>
#include <budwood/quant/kernels/isa.h>
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

using namespace budwood::kernels;
using budwood::quant::kernels::Isa;
using budwood::quant::kernels::ScopedIsa;

namespace {

std::vector<Isa> sets() {
  std::vector<Isa> all;
  for (int i = 0; i <= static_cast<int>(budwood::quant::kernels::best_isa()); ++i)
    all.push_back(static_cast<Isa>(i));
  return all;
}

// The nearest of a type's values to x, by search among the neighbours of a first guess.
double nearest(double x, FloatType type) {
  const auto value = [&](uint16_t half) {
    double wide = 0;
    widen(type, &half, &wide, 1);
    return wide;
  };
  double best = 0;
  for (uint32_t bits = 0; bits < 0x8000u; ++bits) {
    const double y = value(static_cast<uint16_t>(bits));
    if (!std::isfinite(y)) continue;
    const double old = std::abs(best - std::abs(x)), now = std::abs(y - std::abs(x));
    if (now < old || (now == old && bits % 2 == 0)) best = y;
  }
  return std::copysign(best, x);
}

}  // namespace

TEST_CASE("a product is added in the order of its ranks, with the same bits everywhere") {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const int64_t cols : {1, 7, 8, 300, 517}) {
    for (const int64_t rank : {0, 1, 5, 16}) {
      const int64_t rows = 5;
      std::vector<double> panel(static_cast<size_t>(rows * cols));
      for (auto& x : panel) x = normal(random);
      std::vector<float> left(static_cast<size_t>(rows * rank) + 1);
      std::vector<float> right(static_cast<size_t>(cols * rank) + 1);
      for (auto& x : left) x = normal(random);
      for (auto& x : right) x = normal(random);
      // left as [rank, rows], right as [cols, rank]: strides of both kinds.
      const Factor l = {left.data(), 1, rows, 1.7}, r = {right.data(), rank, 1, 0.3};
      auto wanted = panel;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
          double sum = wanted[static_cast<size_t>(i * cols + j)];
          for (int64_t k = 0; k < rank; ++k) {
            const double a = 1.7 * left[static_cast<size_t>(i + k * rows)];
            const double b = 0.3 * right[static_cast<size_t>(j * rank + k)];
            sum = std::fma(a, b, sum);
          }
          wanted[static_cast<size_t>(i * cols + j)] = sum;
        }
      for (const auto set : sets()) {
        const ScopedIsa forced(set);
        auto found = panel;
        add_product(found.data(), rows, cols, l, r, rank);
        CHECK(std::memcmp(found.data(), wanted.data(), found.size() * sizeof(double)) == 0);
      }
    }
  }
}

TEST_CASE("16-bit results are rounded once, also where fp32 lies on a tie that fp64 does not") {
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  for (const auto type : {FloatType::bf16, FloatType::fp16}) {
    std::vector<double> values = {0.0, -0.0, 1e-50, -1e-50, 1.0, 6e-8, 3e-8, 2.9802322387695312e-8};
    const double half_step = type == FloatType::bf16 ? 0x1p-8 : 0x1p-11;
    for (const double away : {0.0, 0x1p-40, -0x1p-40})
      for (const double sign : {1.0, -1.0})
        values.push_back(sign * (1 + half_step + away)),
            values.push_back(sign * (1 + 3 * half_step + away));
    for (int i = 0; i < 30; ++i) values.push_back(normal(random));
    for (const auto set : sets()) {
      const ScopedIsa forced(set);
      std::vector<uint16_t> rounded(values.size());
      CHECK(round_once(values.data(), type, rounded.data(), static_cast<int64_t>(values.size())));
      std::vector<double> found(values.size());
      widen(type, rounded.data(), found.data(), static_cast<int64_t>(values.size()));
      for (size_t i = 0; i < values.size(); ++i) {
        CAPTURE(values[i]);
        CHECK(found[i] == nearest(values[i], type));
        CHECK(std::signbit(found[i]) == std::signbit(values[i]));
      }
    }
  }
}

TEST_CASE("what is not finite in the result's type is found, wherever it stands") {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const auto set : sets()) {
    const ScopedIsa forced(set);
    for (const auto& [type, large] :
         {std::pair{FloatType::fp32, 3.5e38}, std::pair{FloatType::bf16, 3.4e38},
          std::pair{FloatType::fp16, 65520.0}}) {
      for (const size_t at : {0, 9, 36}) {
        for (const double bad : {large, -large, infinity, std::nan("")}) {
          std::vector<double> values(37, 1.0);
          std::vector<float> room(37);
          CHECK(round_once(values.data(), type, room.data(), 37));
          values[at] = bad;
          CHECK_FALSE(round_once(values.data(), type, room.data(), 37));
        }
      }
    }
    const double fits = 65519.9;
    uint16_t half = 0;
    CHECK(round_once(&fits, FloatType::fp16, &half, 1));
  }
}

TEST_CASE("sums of a change are the same on every instruction set, with tails") {
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  for (const size_t n : {0, 5, 8, 61}) {
    std::vector<double> before(n), after(n), written(n);
    double weight = 0, delta = 0, left = 0, error = 0;
    for (size_t i = 0; i < n; ++i) {
      before[i] = normal(random);
      after[i] = before[i] + 0.1 * normal(random);
      written[i] = after[i] + 0.01 * normal(random);
      weight += before[i] * before[i];
      delta += (after[i] - before[i]) * (after[i] - before[i]);
      left += (written[i] - before[i]) * (after[i] - before[i]);
      error += (written[i] - after[i]) * (written[i] - after[i]);
    }
    FoldSums first;
    for (const auto set : sets()) {
      const ScopedIsa forced(set);
      const auto found =
          sums_of(before.data(), after.data(), written.data(), static_cast<int64_t>(n));
      CHECK(found.weight == doctest::Approx(weight));
      CHECK(found.delta == doctest::Approx(delta));
      CHECK(found.left == doctest::Approx(left));
      CHECK(found.error == doctest::Approx(error));
      if (set == Isa::scalar) first = found;
      CHECK(std::memcmp(&found, &first, sizeof first) == 0);
    }
  }
}
