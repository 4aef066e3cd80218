#include <budwood/peft/kernels/cross_entropy.h>

#include "kernel_cases.h"

using namespace budwood::kernels;
using namespace kernel_cases;
using budwood::quant::kernels::FloatType;

namespace {

struct Reference {
  std::vector<double> losses, gradient;
};

Reference reference(const std::vector<float>& x, int64_t classes,
                    const std::vector<int64_t>& labels, const CrossEntropyOptions& o) {
  Reference r;
  r.gradient.assign(x.size(), 0.0);
  for (size_t i = 0; i < labels.size(); ++i) {
    const float* row = x.data() + i * static_cast<size_t>(classes);
    double* grad = r.gradient.data() + i * static_cast<size_t>(classes);
    if (labels[i] < 0) {
      r.losses.push_back(0);
      continue;
    }
    double sum = 0, mean = 0;
    for (int64_t c = 0; c < classes; ++c) {
      sum += std::exp(double{row[c]});
      mean += double{row[c]} / static_cast<double>(classes);
    }
    const double lse = std::log(sum), w = o.weights ? double{o.weights[i]} : 1.0;
    const double e = double{o.label_smoothing}, z = double{o.z_loss};
    r.losses.push_back(
        w * ((1 - e) * (lse - double{row[labels[i]]}) + e * (lse - mean) + z * lse * lse));
    for (int64_t c = 0; c < classes; ++c)
      grad[c] = w * ((1 + 2 * z * lse) * std::exp(double{row[c]}) / sum -
                     (c == labels[i] ? 1 - e : 0) - e / static_cast<double>(classes));
  }
  return r;
}

}  // namespace

TEST_CASE("the loss and its gradient over the logits equal the float64 formula") {
  const std::vector<float> weights = {1.0f, 0.5f, 2.0f, 0.0f, 1.5f};
  for (const int64_t classes : {1, 2, 7, 64, 1003}) {
    const std::vector<int64_t> labels = {0, classes - 1, -100, classes / 2, 0};
    const auto logits = normal_floats(5 * classes, 3, 4.0f);
    for (const CrossEntropyOptions& options :
         {CrossEntropyOptions{}, CrossEntropyOptions{.label_smoothing = 0.1f},
          CrossEntropyOptions{
              .label_smoothing = 0.2f, .z_loss = 1e-3f, .weights = weights.data()}}) {
      const auto wanted = reference(logits, classes, labels, options);
      on_each_isa([&] {
        CAPTURE(classes);
        for (const bool gradient : {false, true}) {
          auto x = logits;
          std::vector<float> losses(5);
          auto o = options;
          o.gradient = gradient;
          cross_entropy({x.data(), FloatType::fp32, classes}, 5, classes, labels.data(), o,
                        losses.data(), threads_of(2));
          CHECK(distance(losses, wanted.losses, 1.0) < 2e-6);
          if (gradient && classes > 1) CHECK(distance(x, wanted.gradient) < 2e-6);
          if (!gradient) CHECK(x == logits);
        }
      });
    }
  }
}

TEST_CASE("logits far from zero, infinite or NaN give what the formula gives") {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> x = {1e4f, 1e4f,          -1e4f, -inf, 0.0f, -inf,  // finite
                          0.0f, std::nanf(""), 0.0f,  0.0f, 0.0f, 0.0f};
  on_each_isa([&] {
    auto logits = x;
    std::vector<float> losses(4);
    const std::vector<int64_t> labels = {0, 1, 0, 2};
    cross_entropy({logits.data(), FloatType::fp32, 3}, 4, 3, labels.data(), {.gradient = true},
                  losses.data(), {});
    CHECK(losses[0] == doctest::Approx(std::log(2.0)));
    CHECK(losses[1] == doctest::Approx(0.0));
    CHECK(std::isnan(losses[2]));
    CHECK(std::isnan(logits[6]));
    CHECK(losses[3] == doctest::Approx(std::log(3.0)));
  });
}
