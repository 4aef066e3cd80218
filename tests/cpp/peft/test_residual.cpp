#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <budwood/peft/residual.h>
#include <budwood/quant/error.h>
#include <budwood/quant/quantize.h>

#include <cmath>
#include <string>
#include <vector>

// Behind torch, whose logging defines CHECK too.
#include <doctest/doctest.h>

using namespace budwood;

namespace {

at::Tensor matrix(int64_t out, int64_t in) {
  return at::randn({out, in}, at::make_generator<at::CPUGeneratorImpl>(2));
}

double error_of(const at::Tensor& w, const quant::Weight& q, const ResidualStart& start,
                double scaling) {
  const auto base = (start.base ? *start.base : q).rows(0, q.out, at::kFloat).to(at::kDouble);
  const auto product = scaling * start.b.to(at::kDouble).mm(start.a.to(at::kDouble));
  const auto wide = w.to(at::kDouble);
  return ((wide - base - product).norm() / wide.norm()).item<double>();
}

}  // namespace

TEST_CASE("LoftQ leaves the singular values beyond its rank, whatever the scaling") {
  const auto w = matrix(48, 64);
  for (const char* format : {"nf4", "fp4", "int4"}) {
    const auto q = quant::quantize(w, {.format = format, .block_size = 32});
    const auto rest = w.to(at::kDouble) - q.rows(0, 48, at::kFloat).to(at::kDouble);
    const auto values = at::linalg_svdvals(rest);
    for (const double scaling : {1.0, 0.3}) {
      const auto start = residual_start(w, q, 8, scaling, {});
      CHECK_FALSE(start.base.has_value());
      const auto bound = values.narrow(0, 8, 40).norm() / w.norm();
      CHECK(error_of(w, q, start, scaling) == doctest::Approx(bound.item<double>()).epsilon(1e-5));
      CHECK(start.after == doctest::Approx(bound.item<double>()).epsilon(1e-5));
      CHECK(start.after < start.before);
    }
  }
}

TEST_CASE("iterations keep the best, and what is reported is what is there") {
  const auto w = matrix(64, 64);
  const auto q = quant::quantize(w, {});
  double last = 1;
  for (const int64_t iterations : {1, 2, 4}) {
    const auto start = residual_start(w, q, 16, 2.0, {.iterations = iterations});
    CHECK(error_of(w, q, start, 2.0) == doctest::Approx(start.after).epsilon(1e-5));
    CHECK(start.after <= last);
    CHECK(start.base.has_value() == (start.iteration > 1));
    last = start.after;
  }
  const auto pissa = residual_start(w, q, 16, 2.0, {.method = "qpissa"});
  CHECK(pissa.base.has_value());
  CHECK(error_of(w, q, pissa, 2.0) == doctest::Approx(pissa.after).epsilon(1e-5));
}

TEST_CASE("with white inputs EoRA is LoftQ") {
  const auto w = matrix(32, 64);
  const auto q = quant::quantize(w, {});
  const auto plain = residual_start(w, q, 4, 1.0, {});
  const auto eora = residual_start(w, q, 4, 1.0, {.method = "eora"}, at::eye(64) * 3.0);
  CHECK(eora.after == doctest::Approx(plain.after).epsilon(1e-6));
  const auto one = plain.b.mm(plain.a), two = eora.b.mm(eora.a);
  CHECK((one - two).norm().item<double>() < 1e-4 * one.norm().item<double>());
}
