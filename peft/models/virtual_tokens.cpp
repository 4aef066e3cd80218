#include <ATen/ATen.h>

#include <budwood/peft/models/virtual_tokens.h>
#include <algorithm>

namespace budwood::models {
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

std::pair<TokenBatch, at::Tensor> with_virtual_tokens(const InputSlot& input,
                                                      const TokenBatch& batch,
                                                      const at::Tensor& labels) {
  if (!batch.virtual_rows.empty() || input->virtual_tokens() == 0) return {batch, labels};
  auto layout = batch.layout();
  if (layout.prompt.empty() && labels.defined())
    layout.prompt = prompts_by_labels(batch.cu_seqlens, labels);
  const auto inserted = *input->insert(layout);
  TokenBatch full;
  const auto index =
      at::tensor(inserted.rows, at::TensorOptions().dtype(at::kLong)).to(batch.ids.device());
  full.ids =
      at::where(index.ge(0), batch.ids.index_select(0, index.clamp_min(0)), at::zeros_like(index));
  full.cu_seqlens = inserted.cu;
  full.virtual_rows = inserted.rows;
  std::vector<int64_t> positions(inserted.rows.size());
  for (size_t s = 0; s + 1 < inserted.cu.size(); ++s)
    for (int64_t i = inserted.cu[s]; i < inserted.cu[s + 1]; ++i)
      positions[static_cast<size_t>(i)] = i - inserted.cu[s];
  full.positions =
      at::tensor(positions, at::TensorOptions().dtype(at::kLong)).to(batch.ids.device());
  const int64_t count = input->virtual_tokens();
  full.prompt = layout.prompt;
  for (auto& n : full.prompt) n += count;
  return {std::move(full), labels.defined() ? labels_with_virtual(labels, inserted) : labels};
}

}  // namespace budwood::models
