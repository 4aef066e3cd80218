#include "tiny.h"

#include <budwood/peft/train/evaluation.h>

#include <cmath>

using namespace budwood;
using namespace budwood::train;
using namespace budwood::train::testing;

TEST_CASE("an evaluation is the mean over counted tokens, with a ratio estimator's error") {
  const auto model = tiny_model(0.5);
  const auto data = random_rows(12, 9);
  Sampler sampler(data, {9, 2, "pack", "truncate", false});
  const auto e = evaluate(*model, sampler);

  // Reference: every row by itself, in fp64, full logits.
  at::NoGradGuard no_grad;
  model->eval();
  std::vector<double> sums, counts;
  for (int64_t r = 0; r < data->rows(); ++r) {
    std::vector<int64_t> ids(data->ids(r).begin(), data->ids(r).end());
    const auto row = at::tensor(ids, at::kLong);
    const auto logits = (*model).forward(row.slice(0, 0, -1).unsqueeze(0))[0].to(at::kDouble);
    const auto log_p = at::log_softmax(logits, 1);
    double sum = 0, n = 0;
    for (int64_t t = 1; t < row.size(0); ++t)
      if (data->counts(r, t)) sum -= log_p[t - 1][row[t].item<int64_t>()].item<double>(), ++n;
    if (n > 0) sums.push_back(sum), counts.push_back(n);
  }
  double sum = 0, n = 0, squares = 0;
  for (size_t i = 0; i < sums.size(); ++i) sum += sums[i], n += counts[i];
  for (size_t i = 0; i < sums.size(); ++i) squares += std::pow(sums[i] - sum / n * counts[i], 2);
  const auto k = static_cast<double>(sums.size());
  CHECK(e.loss == doctest::Approx(sum / n).epsilon(1e-6));
  CHECK(e.loss_error == doctest::Approx(std::sqrt(k / (k - 1) * squares) / n).epsilon(1e-5));
  CHECK(e.perplexity == doctest::Approx(std::exp(sum / n)).epsilon(1e-6));
  CHECK(e.perplexity_error == doctest::Approx(e.perplexity * e.loss_error));
  CHECK(e.tokens == static_cast<int64_t>(n));
  CHECK(e.sequences == static_cast<int64_t>(k));
}

TEST_CASE("an evaluation leaves modes, gradients, random numbers and the sampler as they were") {
  const auto model = tiny_model(0.5);
  Sampler sampler(random_rows(12, 9), {9, 2, "none", "truncate", false});
  sampler.next();
  model->train();
  model->named_modules()["proj"]->eval();
  auto generator = at::detail::getDefaultCPUGenerator();
  const auto random = generator.get_state();
  const auto first = evaluate(*model, sampler, 2);
  CHECK(first.loss == evaluate(*model, sampler, 2).loss);
  CHECK(first.tokens < evaluate(*model, sampler).tokens);
  CHECK(generator.get_state().equal(random));
  CHECK(sampler.state().batch == 1);
  CHECK(model->is_training());
  CHECK_FALSE(model->named_modules()["proj"]->is_training());
  CHECK(model->named_modules()["out"]->is_training());
  for (const auto& [path, p] : trainable_parameters(*model)) CHECK_FALSE(p.grad().defined());
}

TEST_CASE("one sequence has no standard error") {
  const auto model = tiny_model();
  Sampler sampler(std::make_shared<Rows>(std::vector<std::vector<uint32_t>>{{1, 2, 3}}), {});
  CHECK(std::isnan(evaluate(*model, sampler).loss_error));
}
