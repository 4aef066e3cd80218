#include "tiny.h"

#include <budwood/peft/train/schedule.h>

#include <cmath>

using namespace budwood::train;
using namespace budwood::train::testing;

TEST_CASE("a schedule rises from 0 over the warmup, then falls to its least factor at the end") {
  for (const std::string name : {"linear", "cosine"})
    for (const double least : {0.0, 0.1}) {
      const Schedule schedule{name, 10, 100, least};
      CHECK(schedule.multiplier(0) == 0.0);
      CHECK(schedule.multiplier(5) == 0.5);
      CHECK(schedule.multiplier(10) == 1.0);
      CHECK(schedule.multiplier(55) == doctest::Approx(0.5 * (1 - least) + least));
      CHECK(schedule.multiplier(100) == doctest::Approx(least));
      CHECK(schedule.multiplier(200) == doctest::Approx(least));
      for (int64_t s = 11; s <= 100; ++s)
        CHECK(schedule.multiplier(s) <= schedule.multiplier(s - 1));
    }
  const Schedule constant{"constant", 4, 0};
  CHECK(constant.multiplier(1) == 0.25);
  CHECK(constant.multiplier(1000000) == 1.0);
}

TEST_CASE("a schedule that means nothing is refused by field and value") {
  CHECK(contains(message_of([] { Schedule{"cosin", 0, 1}.validate(); }), "name is \"cosin\""));
  CHECK(contains(message_of([] { Schedule{"linear", -1, 1}.validate(); }), "warmup_steps is -1"));
  CHECK(contains(message_of([] {
                   Schedule{"linear", 0, 1, std::nan("")}.validate();
                 }),
                 "min_ratio"));
}
