#include "tiny.h"

#include <budwood/peft/train/options.h>

using namespace budwood::train;
using namespace budwood::train::testing;

namespace {

std::string refusal(const std::string& json) {
  return message_of([&] { TrainOptions::from_json(json, "run.json"); });
}

}  // namespace

TEST_CASE("options read back what they wrote, and keep defaults where nothing is said") {
  auto options =
      TrainOptions::from_json(R"({"steps": 7, "learning_rate": 1e-3, "packing": "concat"})");
  CHECK(options.steps == 7);
  CHECK(options.learning_rate == 1e-3);
  CHECK(options.batch_size == TrainOptions().batch_size);
  options.min_learning_rate_ratio = 0.1;
  options.output = "a \"quoted\" folder";
  const auto again = TrainOptions::from_json(options.to_json());
  CHECK(again.to_json() == options.to_json());
  CHECK(again.output == options.output);
}

TEST_CASE("an unknown option is refused with the nearest one, a wrong type with what is wanted") {
  CHECK(contains(refusal(R"({"learning_rat": 1})"),
                 "'learning_rat'; the nearest is 'learning_rate'"));
  CHECK(contains(refusal(R"({"steps": "ten"})"), "steps is \"ten\""));
  CHECK(contains(refusal(R"({"steps": 1.5})"), "steps is 1.5"));
  CHECK(contains(refusal(R"({"steps": 1, "steps": 2})"), "steps"));
  CHECK(contains(refusal("[1]"), "JSON object"));
  CHECK(contains(refusal("{"), "run.json"));
}

TEST_CASE("a value out of range is refused with field, value and range") {
  CHECK(contains(refusal(R"({"batch_size": 0})"), "batch_size is 0, wanted at least 1"));
  CHECK(contains(refusal(R"({"epochs": 0})"), "epochs is 0"));
  CHECK(contains(refusal(R"({"learning_rate": -1})"), "learning_rate is -1"));
  CHECK(contains(refusal(R"({"beta2": 1})"), "beta2 is 1"));
  CHECK(contains(refusal(R"({"eps": 0})"), "eps is 0"));
  CHECK(contains(refusal(R"({"schedule": "cosin"})"), "schedule is 'cosin'"));
  CHECK(contains(refusal(R"({"packing": "best"})"), "packing is \"best\""));
  CHECK(contains(refusal(R"({"warmup_ratio": 2})"), "warmup_ratio is 2"));
  CHECK(contains(refusal(R"({"max_grad_norm": -1})"), "max_grad_norm is -1"));
  CHECK(contains(refusal(R"({"log_every": 0})"), "log_every is 0"));
  CHECK(contains(refusal(R"({"seed": -1})"), "seed is -1"));
  CHECK(contains(refusal(R"({"save_every": 5})"), "output is empty"));
  CHECK(contains(refusal(R"({"resume": "auto", "overwrite": true, "output": "x"})"), "overwrite"));
}

TEST_CASE("only options that change the numbers of a run count as differences") {
  TrainOptions a, b;
  b.output = "elsewhere";
  b.log_every = 3;
  b.save_every = 9;
  b.resume = "auto";
  CHECK(a.differences(b).empty());
  b.batch_size = 3;
  b.steps = 100;
  CHECK(a.differences(b) == std::vector<std::string>{"steps", "batch_size"});
  a.schedule = b.schedule = "constant";
  CHECK(a.differences(b) == std::vector<std::string>{"batch_size"});
}
