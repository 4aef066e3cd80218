#include <budwood/peft/train/memory_plan.h>

#include "tiny.h"

using namespace budwood::train;
using budwood::train::testing::TinyLM;

TEST_CASE("a plan counts frozen and trained tensors once, and each trained one four times") {
  TinyLM model;
  for (auto& p : model.parameters()) p.requires_grad_(false);
  int64_t all = 0;
  for (const auto& p : model.parameters()) all += static_cast<int64_t>(p.nbytes());
  const auto frozen = plan_memory(model, 10);
  CHECK(frozen.weights == all);
  CHECK(frozen.adapters == 0);
  CHECK(frozen.process > 0);
  CHECK(frozen.mapped <= frozen.weights);

  auto trained = model.parameters()[0].requires_grad_(true);
  const auto bytes = static_cast<int64_t>(trained.nbytes());
  const auto plan = plan_memory(model, 10);
  CHECK(plan.weights == all - bytes);
  CHECK(plan.adapters == bytes);
  CHECK(plan.gradients == bytes);
  CHECK(plan.optimizer == 2 * bytes);
  CHECK(plan.total() == plan.process + all + 3 * bytes + plan.activations + plan.workspace);
}
