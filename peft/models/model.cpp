#include <ATen/ATen.h>

#include <budwood/peft/models/model.h>
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

namespace {

// How long each prompt is: up to the token before the first counted label, that one included.
std::vector<int64_t> prompts_by_labels(const std::vector<int64_t>& cu, const at::Tensor& labels) {
  const auto on_host = labels.cpu().contiguous();
  const auto* label = on_host.const_data_ptr<int64_t>();
  std::vector<int64_t> prompt;
  for (size_t s = 0; s + 1 < cu.size(); ++s) {
    int64_t i = cu[s];
    while (i < cu[s + 1] && label[i] < 0) ++i;
    prompt.push_back(std::min(i + 1, cu[s + 1]) - cu[s]);
  }
  return prompt;
}

at::Tensor labels_with_virtual(const at::Tensor& labels, const Inserted& inserted) {
  const auto on_host = labels.cpu().contiguous();
  const auto* label = on_host.const_data_ptr<int64_t>();
  std::vector<int64_t> result(inserted.rows.size(), -100);
  for (size_t s = 0; s + 1 < inserted.cu.size(); ++s) {
    int64_t carried = -100;
    for (int64_t i = inserted.cu[s]; i < inserted.cu[s + 1]; ++i) {
      const auto at = static_cast<size_t>(i);
      const int64_t row = inserted.rows[at];
      if (row >= 0) carried = label[row];
      const bool virtual_next = i + 1 < inserted.cu[s + 1] && inserted.rows[at + 1] < 0;
      if (!virtual_next) result[at] = std::exchange(carried, -100);
    }
  }
  return at::tensor(result, at::TensorOptions().dtype(at::kLong)).to(labels.device());
}

}  // namespace

std::pair<TokenBatch, at::Tensor> CausalLM::with_virtual_tokens(const TokenBatch& batch,
                                                                const at::Tensor& labels) const {
  if (!batch.virtual_rows.empty() || input_->virtual_tokens() == 0) return {batch, labels};
  auto layout = batch.layout();
  if (layout.prompt.empty() && labels.defined())
    layout.prompt = prompts_by_labels(batch.cu_seqlens, labels);
  const auto inserted = *input_->insert(layout);
  TokenBatch full;
  const auto index =
      at::tensor(inserted.rows, at::TensorOptions().dtype(at::kLong)).to(batch.ids.device());
  full.ids = at::where(index.ge(0), batch.ids.index_select(0, index.clamp_min(0)),
                       at::zeros_like(index));
  full.cu_seqlens = inserted.cu;
  full.virtual_rows = inserted.rows;
  std::vector<int64_t> positions(inserted.rows.size());
  for (size_t s = 0; s + 1 < inserted.cu.size(); ++s)
    for (int64_t i = inserted.cu[s]; i < inserted.cu[s + 1]; ++i)
      positions[static_cast<size_t>(i)] = i - inserted.cu[s];
  full.positions =
      at::tensor(positions, at::TensorOptions().dtype(at::kLong)).to(batch.ids.device());
  const int64_t count = input_->virtual_tokens();
  full.prompt = layout.prompt;
  for (auto& n : full.prompt) n += count;
  return {std::move(full), labels.defined() ? labels_with_virtual(labels, inserted) : labels};
}

std::vector<at::Tensor> CausalLM::read_elsewhere(const torch::nn::Module& block) {
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

}  // namespace budwood::models
