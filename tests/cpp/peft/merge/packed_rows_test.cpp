#include <budwood/peft/merge/packed_rows.h>
#include <doctest/doctest.h>

#include <cmath>

using namespace budwood;

TEST_CASE("steps of a dtype are the distances between its neighbours") {
  CHECK(step_at(1.0, io::Dtype::f32) == std::ldexp(1.0, -23));
  CHECK(step_at(1.5, io::Dtype::bf16) == std::ldexp(1.0, -7));
  CHECK(step_at(4.0, io::Dtype::f16) == std::ldexp(1.0, -8));
  CHECK(step_at(0.0, io::Dtype::f16) == std::ldexp(1.0, -24));
  CHECK(step_at(0.0, io::Dtype::bf16) == std::ldexp(1.0, -133));
  const auto steps = steps_of({.dtype = io::Dtype::bf16}, {0.0f, 9.0f}, {1.0, 2.0}, 2);
  CHECK(steps == std::vector<double>{std::ldexp(1.0, -7), std::ldexp(1.0, -6)});
}

TEST_CASE("steps of blocks go by the largest of a block, or by what it spans") {
  const std::vector<float> values = {1, -4, 0, 2, 8, 8, 7, 6};
  const std::vector<double> reach(8, 1.0);
  CHECK(steps_of({.block = 4, .share = 0.25}, values, reach, 8) ==
        std::vector<double>{1, 1, 1, 1, 2, 2, 2, 2});
  CHECK(steps_of({.block = 4, .share = 0.5, .of_range = true}, values, reach, 4) ==
        std::vector<double>{3, 3, 3, 3, 1, 1, 1, 1});
  // A whole row, and blocks that do not end with rows.
  CHECK(steps_of({.share = 0.25}, values, reach, 4)[0] == 1.0);
  CHECK(steps_of({.block = 3, .share = 0.25}, values, reach, 4)[0] == 2.0);
  // Equal values still have a distance.
  CHECK(steps_of({.share = 0.5, .of_range = true}, {3, 3}, {1, 1}, 2)[0] > 0);
}
