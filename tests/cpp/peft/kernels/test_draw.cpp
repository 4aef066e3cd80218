#include <budwood/peft/kernels/draw.h>
#include <doctest/doctest.h>

#include <cmath>
#include <set>

using namespace budwood::kernels;

TEST_CASE("draws have no number twice, begin alike whatever their length, and are uniform") {
  std::vector<int> often(10);
  for (uint32_t i = 0; i < 20000; ++i) {
    const auto three = draw(10, 3, {.seed = 5, .first = i});
    CHECK(std::set<int64_t>(three.begin(), three.end()).size() == 3);
    for (const auto number : three) ++often[static_cast<size_t>(number)];
  }
  for (const int count : often) CHECK(std::abs(count - 6000) < 5 * std::sqrt(6000 * 0.7));
  const auto all = draw(10, 10, {.seed = 5, .first = 7});
  const auto some = draw(10, 4, {.seed = 5, .first = 7});
  CHECK(std::equal(some.begin(), some.end(), all.begin()));
  CHECK(draw(10, 10, {.seed = 6, .first = 7}) != all);
  CHECK(draw(10, 10, {.seed = 5, .third = 7}) != all);
  CHECK(draw(4, 0, {}).empty());
}
