#include <ATen/ATen.h>

#include <budwood/peft/models/model.h>
#include <budwood/peft/ops/cross_entropy.h>
#include <budwood/quant/error.h>

namespace budwood::models {

at::Tensor CausalLM::forward(const at::Tensor& ids) {
  const auto out = logits(hidden(TokenBatch::from_rows(ids)));
  return out.view({ids.size(0), ids.size(1), out.size(-1)});
}

void CausalLM::set_checkpointing(int64_t every) {
  if (every < 0)
    throw Error("set_checkpointing",
                "every k-th block is checkpointed, 0 for none; found " + std::to_string(every));
  checkpoint_every_ = every;
}

int64_t CausalLM::kept_bytes(int64_t) const {
  return 0;
}

int64_t CausalLM::passing_bytes(int64_t) const {
  return 0;
}

at::Tensor CausalLM::embed(const TokenBatch&) {
  throw Error("embed", "a model of type '" + config_.model_type + "' does not come in blocks");
}

std::vector<Block> CausalLM::blocks() {
  throw Error("blocks", "a model of type '" + config_.model_type + "' does not come in blocks");
}

LossSum CausalLM::loss(const TokenBatch& batch, const at::Tensor& labels) {
  const auto count = labels.ge(0).sum().item<int64_t>();
  if (const auto head = plain_head())
    return {ops::linear_cross_entropy(hidden(batch), labels, *head), count};
  const auto project = [this](const at::Tensor& rows) { return logits(rows); };
  return {ops::linear_cross_entropy(hidden(batch), labels, project, head_parameters()), count};
}

std::vector<at::Tensor> trained_parameters(const torch::nn::Module& module) {
  std::vector<at::Tensor> trained;
  for (const auto& p : module.parameters())
    if (p.requires_grad()) trained.push_back(p);
  return trained;
}

}  // namespace budwood::models
