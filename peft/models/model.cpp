#include <ATen/ATen.h>

#include <budwood/peft/models/model.h>
#include <budwood/peft/models/virtual_tokens.h>
#include <budwood/peft/ops/cross_entropy.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <utility>

namespace budwood::models {

CausalLM::CausalLM(ModelConfig config) : config_(std::move(config)) {
  input_ = register_module("input", InputSlot(config_.vocab_size, config_.hidden_size));
}

at::Tensor CausalLM::forward(const at::Tensor& ids) {
  const auto out = logits(hidden(TokenBatch::from_rows(ids)));
  return out.view({ids.size(0), -1, out.size(-1)});
}

std::pair<TokenBatch, at::Tensor> CausalLM::with_virtual_tokens(const TokenBatch& batch,
                                                                const at::Tensor& labels) const {
  return models::with_virtual_tokens(input_, batch, labels);
}

std::vector<at::Tensor> read_elsewhere(const torch::nn::Module& block) {
  std::vector<at::Tensor> all;
  for (const auto& module : block.modules(/*include_self=*/false))
    if (const auto* adapter = dynamic_cast<const Adapter*>(module.get()))
      for (const auto& tensor : adapter->read_elsewhere())
        if (tensor.requires_grad()) all.push_back(tensor);
  return all;
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
  const auto [full, moved] = with_virtual_tokens(batch, labels);
  const auto count = moved.ge(0).sum().item<int64_t>();
  if (const auto head = plain_head())
    return {ops::linear_cross_entropy(hidden(full), moved, *head), count};
  const auto project = [this](const at::Tensor& rows) { return logits(rows); };
  return {ops::linear_cross_entropy(hidden(full), moved, project, head_parameters()), count};
}

std::vector<at::Tensor> trained_parameters(const torch::nn::Module& module) {
  std::vector<at::Tensor> trained;
  for (const auto& p : module.parameters())
    if (p.requires_grad()) trained.push_back(p);
  return trained;
}

std::vector<at::Tensor> together(std::vector<at::Tensor> tensors,
                                 const std::vector<at::Tensor>& more) {
  for (const auto& tensor : more)
    if (std::none_of(tensors.begin(), tensors.end(),
                     [&](const at::Tensor& own) { return own.is_same(tensor); }))
      tensors.push_back(tensor);
  return tensors;
}

}  // namespace budwood::models
