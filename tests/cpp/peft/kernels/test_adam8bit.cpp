#include <budwood/peft/kernels/adam8bit.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "kernel_cases.h"

using namespace budwood::kernels;

namespace {

struct Moment {
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  Moment(size_t n, size_t block) : codes(n), scales((n + block - 1) / block) {}
  CodedMoment view() { return {codes.data(), scales.data()}; }
};

}  // namespace

TEST_CASE("the dynamic map has 256 rising numbers, 0 and 1, and the published smallest ones") {
  for (const bool with_sign : {true, false}) {
    const auto& map = dynamic_map(with_sign);
    CHECK(std::is_sorted(map.begin(), map.end()));
    CHECK(std::set<float>(map.begin(), map.end()).size() == 256);
    CHECK(map[255] == 1.0f);
    const auto zero = std::find(map.begin(), map.end(), 0.0f);
    REQUIRE(zero != map.end());
    CHECK(*(zero + 1) == doctest::Approx(with_sign ? 5.5e-7 : 3.25e-7));
  }
}

TEST_CASE("codes are the nearest ones, and a positive second moment never becomes 0") {
  constexpr size_t n = 5000, block = 256;
  for (const bool with_sign : {true, false}) {
    auto values = kernel_cases::normal_floats(n, 3);
    for (size_t i = 0; i < n; ++i) {
      values[i] *= std::pow(10.0f, -static_cast<float>(i % 12));
      if (!with_sign) values[i] = std::abs(values[i]);
    }
    values[10] = 0;
    Moment moment(n, block);
    encode_moment(with_sign, block, values.data(), n, moment.view());
    const auto& map = dynamic_map(with_sign);
    for (size_t i = 0; i < n; ++i) {
      const float x = values[i] * (1.0f / moment.scales[i / block]);
      double least = 1e30;
      for (const float level : map) least = std::min(least, std::abs(double{level} - x));
      const double own = std::abs(double{map[moment.codes[i]]} - x);
      if (!with_sign && values[i] > 0 && moment.codes[i] == 1)
        CHECK(own <= map[1]);
      else
        CHECK(own <= least * (1 + 1e-6) + 1e-12);
      if (!with_sign) CHECK((moment.codes[i] == 0) == (values[i] == 0));
    }
    std::vector<float> back(n);
    decode_moment(with_sign, block, moment.view(), n, back.data());
    CHECK(back[10] == 0);
  }
}

TEST_CASE("a step is AdamW's on decoded moments, in any blocks and on every instruction set") {
  constexpr int64_t n = 1000;
  for (const int64_t block : {64, 256, 2048}) {
    const auto size = static_cast<size_t>(n);
    const auto start = kernel_cases::normal_floats(size, 1),
               g = kernel_cases::normal_floats(size, 2);
    const Adam8bitStep step{.rate = 0.01f, .correction2 = 0.4f, .decay = 0.99f};
    Moment m(size, static_cast<size_t>(block)), v(size, static_cast<size_t>(block));
    auto squares = g;
    for (auto& x : squares) x = std::abs(x) * 0.1f;
    encode_moment(true, block, g.data(), n, m.view());
    encode_moment(false, block, squares.data(), n, v.view());
    std::vector<float> old_m(size), old_v(size);
    decode_moment(true, block, m.view(), n, old_m.data());
    decode_moment(false, block, v.view(), n, old_v.data());
    kernel_cases::on_each_isa([&] {
      auto p = start;
      auto m1 = m, v1 = v;
      adamw_8bit(step, block, 0, n, p.data(), g.data(), m1.view(), v1.view());
      std::vector<double> wanted(size);
      for (size_t i = 0; i < size; ++i) {
        const double first = 0.9 * old_m[i] + 0.1 * g[i];
        const double second = 0.999 * old_v[i] + 0.001 * g[i] * g[i];
        wanted[i] = start[i] * 0.99 - 0.01 * first / (std::sqrt(second) / 0.4 + 1e-8);
      }
      CHECK(kernel_cases::distance(p, wanted) < 1e-6);
      // Blocks on their own give the same.
      auto q = start;
      auto m2 = m, v2 = v;
      for (int64_t begin = 0; begin < n; begin += block)
        adamw_8bit(step, block, begin, std::min(block, n - begin), q.data(), g.data(), m2.view(),
                   v2.view());
      CHECK(p == q);
      CHECK(m1.codes == m2.codes);
      CHECK(v1.scales == v2.scales);
    });
  }
}

TEST_CASE("without state and gradient only the decay is left, and a rare gradient does not jump") {
  std::vector<float> p(256, 2.0f), g(256, 0.0f);
  Moment m(256, 256), v(256, 256);
  const auto& map = dynamic_map(true);
  std::fill(m.codes.begin(), m.codes.end(),
            static_cast<uint8_t>(std::find(map.begin(), map.end(), 0.0f) - map.begin()));
  adamw_8bit({.rate = 0.1f, .decay = 0.5f}, 256, 0, 256, p.data(), g.data(), m.view(), v.view());
  CHECK(p == std::vector<float>(256, 1.0f));
  CHECK(v.codes == std::vector<uint8_t>(256, 0));
  g[0] = 1.0f, g[1] = 1e-5f;
  adamw_8bit({.rate = 0.1f}, 256, 0, 256, p.data(), g.data(), m.view(), v.view());
  g[0] = g[1] = 0;
  const float before = p[1];
  adamw_8bit({.rate = 0.1f}, 256, 0, 256, p.data(), g.data(), m.view(), v.view());
  CHECK(std::abs(p[1] - before) < 0.3f);
}
