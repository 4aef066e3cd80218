#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <budwood/peft/models/blocks.h>
#include <budwood/quant/error.h>

namespace budwood::models {
namespace {

// W [out, in] times factors [out, 1] or [1, in], in place of the slot's weight.
void multiply(LinearSlot slot, const at::Tensor& factors) {
  const auto& w = slot->weight();
  slot->replace_weight(quant::Weight::dense(w.rows(0, w.out, at::kFloat).mul(factors)));
}

}  // namespace

bool can_move_scale(const InputGroup& group) {
  return group.norm.defined() || !group.source.is_empty();
}

at::Tensor move_scale(const InputGroup& group, const at::Tensor& wanted) {
  if (!can_move_scale(group) || group.projections.empty())
    throw Error("move_scale", "nothing makes the input that could take up the factor");
  at::NoGradGuard no_grad;
  auto scale = wanted.to(at::kFloat);
  if (group.norm.defined()) {
    const auto old = group.norm.to(at::kFloat), stored = old.div(scale).to(group.norm.dtype());
    scale = at::where(stored == 0, scale, old / stored.to(at::kFloat));
    at::Tensor(group.norm).copy_(stored);
  } else {
    multiply(group.source, scale.reciprocal().unsqueeze(1));
    if (auto bias = LinearSlot(group.source)->bias(); bias.defined()) bias.div_(scale);
  }
  for (const auto& projection : group.projections) multiply(projection.slot, scale.unsqueeze(0));
  return scale;
}

}  // namespace budwood::models
