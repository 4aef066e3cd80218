#pragma once

#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/quant/error.h>
#include <budwood/quant/weight.h>

namespace budwood::quant {

/// |found - wanted| / |wanted|, in float64.
inline double distance(const at::Tensor& found, const at::Tensor& wanted) {
  const auto f = found.to(at::kDouble), w = wanted.to(at::kDouble);
  return ((f - w).norm() / w.norm().clamp_min(1e-300)).item<double>();
}

/// Every product of a packed weight is that of `values` [out, in], the fp32 matrix it stands for.
inline void check_products(const Weight& w, const at::Tensor& values) {
  const auto exact = values.to(at::kDouble);
  CHECK(w.packed());
  CHECK((w.dtype() == at::kFloat));
  CHECK(torch::equal(w.rows(0, w.out, at::kFloat), values));
  CHECK(torch::equal(w.rows(w.out / 2, w.out, at::kDouble), exact.slice(0, w.out / 2)));
  CHECK(torch::equal(w.rows(0, w.out, at::kBFloat16), values.to(at::kBFloat16)));
  const auto ids = torch::tensor({{0L, w.out - 1}, {w.out / 2, 0L}}, at::kLong);
  CHECK(torch::equal(w.gather(ids, at::kHalf), values.index({ids}).to(at::kHalf)));
  CHECK_THROWS_AS(w.gather(torch::tensor({w.out}, at::kLong), at::kFloat), Error);

  for (const int64_t tokens : {1, 3, 8, 64, 300}) {
    const auto x = torch::randn({tokens, w.in}), g = torch::randn({tokens, w.out});
    for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
      const double bound = type == at::kDouble ? 1e-13 : type == at::kFloat ? 1e-6 : 8e-3;
      const auto typed_x = x.to(type), typed_g = g.to(type);
      const auto y = w.linear(typed_x), dx = w.backward_input(typed_g);
      CHECK((y.scalar_type() == type));
      CHECK((dx.scalar_type() == type));
      CHECK(distance(y, typed_x.to(at::kDouble).matmul(exact.t())) < bound);
      CHECK(distance(dx, typed_g.to(at::kDouble).matmul(exact)) < bound);
      // A gain multiplies rows, whatever is added stays as it is.
      const auto gain = torch::randn({w.out}), bias = torch::randn({w.out});
      const auto gained = gain.to(at::kDouble).unsqueeze(1) * exact;
      CHECK(distance(w.linear(typed_x, {.gain = gain, .bias = bias}),
                     typed_x.to(at::kDouble).matmul(gained.t()) + bias) < bound);
      CHECK(distance(w.backward_input(typed_g, {.gain = gain}),
                     typed_g.to(at::kDouble).matmul(gained)) < bound);
    }
  }
  const auto x = torch::randn({2, 0, w.in});
  CHECK((w.linear(x).sizes() == at::IntArrayRef({2, 0, w.out})));
  CHECK((w.linear(torch::randn({w.in})).sizes() == at::IntArrayRef({w.out})));
  CHECK((w.backward_input(torch::randn({2, 0, w.out})).sizes() == at::IntArrayRef({2, 0, w.in})));
  CHECK_THROWS_WITH_AS(w.backward_weight(x, x), doctest::Contains("frozen"), Error);
}

/// The weight with one part replaced.
inline Weight with_part(Weight w, size_t i, at::Tensor part) {
  w.parts[i] = std::move(part);
  return w;
}

inline void check_refused(const Weight& w) {
  CHECK_THROWS_AS(Weight::from_parts(w.parts, static_cast<int64_t>(w.format), w.out, w.in), Error);
}

}  // namespace budwood::quant
