#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/quant/error.h>
#include <budwood/quant/weight.h>

using budwood::Error;
using budwood::quant::Weight;

TEST_CASE("a dense weight multiplies like its matrix in every mix of dtypes") {
  torch::manual_seed(0);
  const auto w = torch::randn({37, 19});
  for (const auto stored : {torch::kFloat, torch::kBFloat16, torch::kHalf, torch::kDouble})
    for (const auto computed : {torch::kFloat, torch::kDouble})
      for (const bool transposed : {false, true}) {
        const auto kept = w.to(stored);
        const auto weight =
            transposed ? Weight::dense_transposed(kept.t().contiguous()) : Weight::dense(kept);
        const auto x = torch::randn({2, 5, 19}, computed), g = torch::randn({2, 5, 37}, computed);
        const auto exact = kept.to(torch::kDouble);
        const double bound = computed == torch::kDouble ? 1e-12 : 1e-5;
        CHECK(torch::allclose(weight.linear(x).to(torch::kDouble),
                              x.to(torch::kDouble).matmul(exact.t()), bound, bound));
        CHECK(torch::allclose(weight.backward_input(g).to(torch::kDouble),
                              g.to(torch::kDouble).matmul(exact), bound, bound));
        const auto gain = torch::randn({37}), bias = torch::randn({37});
        const auto gained = gain.to(torch::kDouble).unsqueeze(1) * exact;
        CHECK(torch::allclose(weight.linear(x, {.gain = gain, .bias = bias}).to(torch::kDouble),
                              x.to(torch::kDouble).matmul(gained.t()) + bias, bound, bound));
        CHECK(torch::allclose(weight.backward_input(g, {.gain = gain}).to(torch::kDouble),
                              g.to(torch::kDouble).matmul(gained), bound, bound));
        CHECK(torch::equal(weight.rows(3, 11, torch::kDouble), exact.slice(0, 3, 11)));
        const auto ids = torch::tensor({{4, 0}, {36, 4}}, torch::kLong);
        CHECK(torch::equal(weight.gather(ids, torch::kDouble),
                           exact.index_select(0, ids.view(-1)).view({2, 2, 19})));
      }
}

TEST_CASE("a weight larger than a panel is multiplied whole") {
  torch::manual_seed(0);
  const auto w = torch::randn({1500, 900}).to(torch::kBFloat16);
  const auto x = torch::randn({3, 900}), g = torch::randn({3, 1500});
  const auto exact = w.to(torch::kFloat);
  CHECK(torch::allclose(Weight::dense(w).linear(x), x.matmul(exact.t()), 1e-4, 1e-4));
  CHECK(torch::allclose(Weight::dense(w).backward_input(g), g.matmul(exact), 1e-4, 1e-4));
}

TEST_CASE("parts that do not fit format and shape are refused") {
  const auto w = torch::randn({4, 3});
  CHECK_THROWS_AS(Weight::from_parts({w}, 0, 3, 4), Error);
  CHECK_THROWS_AS(Weight::from_parts({w}, 1, 4, 3), Error);
  CHECK_THROWS_AS(Weight::from_parts({w, w}, 0, 4, 3), Error);
  CHECK_THROWS_AS(Weight::from_parts({w.to(torch::kLong)}, 0, 4, 3), Error);
  CHECK_THROWS_WITH_AS(Weight::from_parts({w}, 9999, 4, 3),
                       doctest::Contains("unknown weight format 9999"), Error);
  CHECK_THROWS_AS(Weight::dense(w).rows(2, 5, torch::kFloat), Error);
}
