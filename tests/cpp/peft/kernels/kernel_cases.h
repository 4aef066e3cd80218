#pragma once

#include <doctest/doctest.h>

#include <budwood/quant/kernels/gemm.h>
#include <budwood/quant/kernels/isa.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../quant/kernels/test_data.h"

/// What the tests of peft/kernels share.
namespace kernel_cases {

using budwood::quant::kernels::Isa;
using budwood::quant::kernels::ScopedIsa;
using budwood::quant::kernels::Threads;

using budwood::quant::kernels::normal_floats;

inline Threads threads_of(int count) {
  return {count, [](int n, const std::function<void(int)>& body) {
            std::vector<std::thread> threads;
            for (int i = 1; i < n; ++i) threads.emplace_back(body, i);
            body(0);
            for (auto& thread : threads) thread.join();
          }};
}

/// use() with every instruction set that this processor has.
template <class Use>
void on_each_isa(const Use& use) {
  for (const Isa isa : budwood::quant::kernels::all_isas()) {
    const ScopedIsa scope(isa);
    CAPTURE(isa_name(isa));
    use();
  }
}

/// The largest difference, in units of the largest wanted magnitude, which counts as `least` where
/// it is smaller. NaN must meet NaN.
inline double distance(const std::vector<float>& found, const std::vector<double>& wanted,
                       double least = 1e-30) {
  REQUIRE(found.size() == wanted.size());
  double most = least, worst = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    if (std::isnan(wanted[i]) || std::isnan(found[i])) {
      if (std::isnan(wanted[i]) != std::isnan(found[i])) return 1e30;
      continue;
    }
    most = std::max(most, std::abs(wanted[i]));
    worst = std::max(worst, std::abs(static_cast<double>(found[i]) - wanted[i]));
  }
  return worst / most;
}

}  // namespace kernel_cases
