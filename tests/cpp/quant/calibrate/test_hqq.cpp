#include <budwood/quant/calibrate/hqq.h>

#include "inputs.h"

using namespace budwood::quant;
using namespace budwood::quant::calibrate;
using namespace budwood::quant::calibrate::testing;

namespace {

// mean |w - ŵ| of each group, fp64; in is a multiple of the group size.
at::Tensor objective(const at::Tensor& w, const Weight& q, int64_t group) {
  return (w.to(at::kDouble) - values(q).to(at::kDouble)).abs().view({w.size(0), -1, group}).mean(2);
}

// The written formulas for all groups [groups, size], fp64: the best zero point and codes.
std::pair<at::Tensor, at::Tensor> by_formula(const at::Tensor& w, const HqqOptions& options) {
  const double top = options.bits == 4 ? 15 : 255;
  const auto low = w.amin(1, true), high = w.amax(1, true);
  const auto s = top / (high - low);
  auto z = -low * s;
  if (options.round_zero.value_or(options.bits == 4)) z = z.round();
  auto best = z.clone(), least = torch::full_like(z, INFINITY);
  double beta = options.beta;
  for (int64_t t = 0; t <= options.iterations; ++t, beta *= options.beta_growth) {
    const auto q = (w * s + z).round().clamp(0, top), error = w - (q - z) / s;
    const auto mean = error.abs().mean(1, true);
    best = torch::where(mean < least, z, best);
    least = torch::minimum(mean, least);
    const auto size = error.abs();
    const auto e = error.sign() * (size - size.pow(options.norm - 1) / beta).clamp_min(0);
    z = (q - (w - e) * s).mean(1, true);
  }
  return {best, (w * s + best).round().clamp(0, top)};
}

}  // namespace

TEST_CASE("without iterations HQQ stores the golden grid") {
  const auto c = torch::arange(16).to(at::kFloat);
  const auto w = torch::stack({c / 8 - 1, -1.5 * ((16 + c) / 8 - 1)});
  const auto found = hqq(w, {.group_size = 8, .iterations = 0, .round_zero = false});
  const auto scales = torch::tensor({0.0583333299f, 0.0583333299f, 0.0875f, 0.0875f}).view({2, 2});
  const auto zeros = torch::tensor({17.1428585f, -0.0f, 32.1428566f, 49.2857170f}).view({2, 2});
  CHECK(torch::allclose(found.parts[1], scales, 1e-6, 0));
  CHECK(torch::allclose(found.parts[2], zeros, 1e-6, 1e-6));
  // Up in the first row, down in the second.
  const auto up = torch::tensor({0x20, 0x64, 0xb9, 0xfd}, at::kByte);
  CHECK(torch::equal(found.parts[0][0].slice(0, 0, 4), up));
  CHECK(torch::equal(found.parts[0][1].slice(0, 4, 8),
                     torch::tensor({0xdf, 0x9b, 0x46, 0x02}, at::kByte)));
}

TEST_CASE("HQQ is its formulas, with and without outliers") {
  torch::manual_seed(0);
  // Errors of the large matrix reach into the part of the norm that counts outliers.
  for (const double size : {0.05, 1.0, 20.0})
    for (const int64_t bits : {4, 8}) {
      const auto w = size * torch::randn({12, 64}) * torch::exp(torch::randn({12, 64}));
      const HqqOptions options{.bits = bits, .group_size = 32};
      const auto found = hqq(w, options);
      const auto [zero, q] = by_formula(w.to(at::kDouble).view({-1, 32}), options);
      const auto mean = objective(w, found, 32).mean().item<double>();
      const auto low = w.to(at::kDouble).view({-1, 32}).amin(1, true),
                 high = w.to(at::kDouble).view({-1, 32}).amax(1, true);
      const auto values = (q - zero) * (high - low) / (bits == 4 ? 15.0 : 255.0);
      const auto wanted = (w.to(at::kDouble).view({-1, 32}) - values).abs().mean().item<double>();
      CHECK(mean == doctest::Approx(wanted).epsilon(2e-3));
    }
}

TEST_CASE("HQQ is never worse than its start, and better than rounding with whole zeros") {
  torch::manual_seed(1);
  const auto gaussian = torch::randn({64, 256});
  const auto heavy = gaussian / torch::randn({64, 256}).abs().clamp_min(0.2);
  for (const auto& w : {gaussian, heavy, 0.01 * gaussian + 3.0})
    for (const int64_t bits : {4, 8}) {
      const auto start = hqq(w, {.bits = bits, .iterations = 0}), found = hqq(w, {.bits = bits});
      const auto before = objective(w, start, 64), after = objective(w, found, 64);
      CHECK((after <= before * (1 + 1e-6) + 1e-9).all().item<bool>());
      CHECK(after.mean().item<double>() < before.mean().item<double>());
      CHECK((values(found) - w).norm().item<double>() <
            (rtn(w, bits, 64) - w).norm().item<double>());
    }
}

TEST_CASE("groups of one value are kept, and quantize() knows the method") {
  torch::manual_seed(2);
  auto w = torch::randn({5, 75});
  w.slice(1, 0, 32).fill_(-0.7);
  w[2].zero_();
  const auto found = hqq(w, {.group_size = 32});
  CHECK(torch::equal(values(found).slice(1, 0, 32), w.slice(1, 0, 32)));
  CHECK(torch::equal(values(found)[2], w[2]));
  const auto same = quantize(w, {.format = "int4", .block_size = 32, .method = "hqq"});
  for (size_t i = 0; i < 4; ++i) CHECK(torch::equal(found.parts[i], same.parts[i]));
  CHECK_THROWS_WITH_AS(quantize(w, {.format = "nf4", .method = "hqq"}),
                       doctest::Contains("method 'hqq' for 'nf4'"), budwood::Error);
  CHECK_THROWS_AS(hqq(w * NAN), budwood::Error);
  CHECK_THROWS_AS(hqq(w, {.iterations = -1}), budwood::Error);
  CHECK_THROWS_WITH_AS(hqq(torch::tensor({{-3e38f, 3e38f}})), doctest::Contains("row 0, group 0"),
                       budwood::Error);
}
