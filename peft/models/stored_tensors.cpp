#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/stored_tensors.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>

namespace budwood::models {
namespace {

void check_plain(const std::string& where, const std::string& path, const Slot& slot) {
  if (slot.merged().empty() && !slot.adapter_names().empty())
    throw Error(where, fmt::format("'{}' has the adapter '{}', which a plain model cannot hold: "
                                   "merge or detach it first",
                                   path, slot.adapter_names()[0]));
}

}  // namespace

std::vector<int64_t> StoredTensor::shape() const {
  if (!matrix) return vector.sizes().vec();
  return transposed ? std::vector<int64_t>{matrix->in, matrix->out}
                    : std::vector<int64_t>{matrix->out, matrix->in};
}

at::Tensor StoredTensor::rows(int64_t begin, int64_t end, at::ScalarType dtype) const {
  if (transposed)
    return matrix->rows(0, matrix->out, dtype).t().slice(0, begin, end).cpu().contiguous();
  const auto values = matrix ? matrix->rows(begin, end, dtype) : vector.unsqueeze(0).to(dtype);
  return values.cpu().contiguous();
}

bool head_is_tied(CausalLM& model) {
  if (!model.config().tie_word_embeddings) return false;
  const auto modules = model.named_modules("", /*include_self=*/false);
  const auto* head = dynamic_cast<LinearSlotImpl*>(modules["lm_head"].get());
  const auto* table = dynamic_cast<EmbeddingSlotImpl*>(modules[model.input_embedding()].get());
  return head && table && head->weight().parts[0].is_same(table->weight().parts[0]);
}

std::map<std::string, StoredTensor> stored_tensors(CausalLM& model, const std::string& where) {
  const bool tied = head_is_tied(model);
  std::map<std::string, StoredTensor> all;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto& path = item.key();
    auto* module = item.value().get();
    if (dynamic_cast<Adapter*>(module)) continue;
    if (const auto* slot = dynamic_cast<Slot*>(module)) check_plain(where, path, *slot);
    if (const auto* slot = dynamic_cast<LinearSlotImpl*>(module)) {
      if (path == "lm_head" && tied) continue;
      const bool transposed = model.stores_transposed(path);
      if (transposed && slot->weight().packed())
        throw Error(where, fmt::format("'{}' is packed, and checkpoints of {} hold its transpose, "
                                       "which no packed layout has",
                                       path, model.model_type()));
      all.emplace(path + ".weight", StoredTensor{slot->weight(), {}, true, transposed});
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
