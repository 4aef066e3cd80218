#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/stored_tensors.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>

namespace budwood::models {
namespace {

void check_plain(const std::string& where, const std::string& path, const LinearSlotImpl& slot) {
  if (slot.merged().empty() && !slot.adapter_names().empty())
    throw Error(where, fmt::format("'{}' has the adapter '{}', which a plain model cannot hold: "
                                   "merge or detach it first",
                                   path, slot.adapter_names()[0]));
}

}  // namespace

std::vector<int64_t> StoredTensor::shape() const {
  return matrix ? std::vector<int64_t>{matrix->out, matrix->in} : vector.sizes().vec();
}

at::Tensor StoredTensor::rows(int64_t begin, int64_t end, at::ScalarType dtype) const {
  const auto values = matrix ? matrix->rows(begin, end, dtype) : vector.unsqueeze(0).to(dtype);
  return values.cpu().contiguous();
}

bool head_is_tied(CausalLM& model) {
  if (!model.config().tie_word_embeddings) return false;
  const auto modules = model.named_modules("", /*include_self=*/false);
  const auto* head = dynamic_cast<LinearSlotImpl*>(modules["lm_head"].get());
  const auto* table = dynamic_cast<EmbeddingSlotImpl*>(modules["model.embed_tokens"].get());
  return head && table && head->weight().parts[0].is_same(table->weight().parts[0]);
}

std::map<std::string, StoredTensor> stored_tensors(CausalLM& model, const std::string& where) {
  const bool tied = head_is_tied(model);
  std::map<std::string, StoredTensor> all;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto& path = item.key();
    auto* module = item.value().get();
    if (dynamic_cast<Adapter*>(module)) continue;
    if (const auto* slot = dynamic_cast<LinearSlotImpl*>(module)) {
      check_plain(where, path, *slot);
      if (path == "lm_head" && tied) continue;
      all.emplace(path + ".weight", StoredTensor{slot->weight(), {}, true});
      if (slot->bias().defined()) all.emplace(path + ".bias", StoredTensor{{}, slot->bias()});
    } else if (const auto* table = dynamic_cast<EmbeddingSlotImpl*>(module)) {
      all.emplace(path + ".weight", StoredTensor{table->weight(), {}});
    } else {
      for (const auto& p : module->named_parameters(/*recurse=*/false))
        all.emplace(path + "." + p.key(), StoredTensor{{}, p.value()});
    }
  }
  return all;
}

}  // namespace budwood::models
