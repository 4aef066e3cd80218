#include <budwood/peft/kernels/rank.h>

#include "kernel_cases.h"

using namespace budwood::kernels;
using namespace kernel_cases;
using budwood::quant::kernels::FloatType;

TEST_CASE("the gradient of a low-rank factor equals float64, for every shape and storage") {
  for (const int64_t m : {0, 1, 63, 200})
    for (const int64_t r : {1, 3, 16, 33})
      for (const int64_t n : {1, 64, 100}) {
        const auto narrow = normal_floats(m * r, 1);
        auto wide = normal_floats(m * n, 2);
        std::vector<uint16_t> half(wide.size());
        budwood::quant::kernels::fp32_to_bf16(wide.data(), half.data(), m * n);
        budwood::quant::kernels::bf16_to_fp32(half.data(), wide.data(), m * n);
        std::vector<double> wanted(static_cast<size_t>(r * n));
        for (int64_t i = 0; i < m; ++i)
          for (int64_t a = 0; a < r; ++a)
            for (int64_t b = 0; b < n; ++b)
              wanted[static_cast<size_t>(a * n + b)] +=
                  0.5 * double{narrow[static_cast<size_t>(i * r + a)]} *
                  double{wide[static_cast<size_t>(i * n + b)]};
        on_each_isa([&] {
          std::vector<float> found(wanted.size(), 9.0f), again(wanted.size());
          gradient_of_factor(narrow.data(), r, {wide.data(), FloatType::fp32, n}, m, r, n, 0.5f,
                             found.data(), threads_of(2));
          gradient_of_factor(narrow.data(), r, {half.data(), FloatType::bf16, n}, m, r, n, 0.5f,
                             again.data(), threads_of(3));
          CHECK(distance(found, wanted, std::sqrt(1.0 + static_cast<double>(m))) < 2e-6);
          CHECK(found == again);
        });
      }
}
