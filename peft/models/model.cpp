#include <ATen/ATen.h>

#include <budwood/peft/models/model.h>
#include <budwood/peft/ops/cross_entropy.h>

namespace budwood::models {

at::Tensor CausalLM::forward(const at::Tensor& ids) {
  const auto out = logits(hidden(TokenBatch::from_rows(ids)));
  return out.view({ids.size(0), ids.size(1), out.size(-1)});
}

LossSum CausalLM::loss(const TokenBatch& batch, const at::Tensor& labels) {
  const auto project = [this](const at::Tensor& rows) { return logits(rows); };
  return {ops::linear_cross_entropy(hidden(batch), labels, project, head_parameters()),
          labels.ge(0).sum().item<int64_t>()};
}

}  // namespace budwood::models
