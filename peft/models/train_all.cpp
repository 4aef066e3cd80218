#include <fmt/format.h>

#include <budwood/peft/adapter.h>
#include <budwood/peft/models/train_all.h>
#include <budwood/quant/error.h>

namespace budwood::models {

void train_all(CausalLM& model) {
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (dynamic_cast<const Adapter*>(item.value().get()) != nullptr)
      throw Error("train_all", fmt::format("the model has an adapter at {}: detach adapters, or "
                                           "train them alone",
                                           item.key()));
    const auto* linear = dynamic_cast<const LinearSlotImpl*>(item.value().get());
    const auto* table = dynamic_cast<const EmbeddingSlotImpl*>(item.value().get());
    const auto* weight = linear ? &linear->weight() : table ? &table->weight() : nullptr;
    if (weight != nullptr && (weight->packed() || !weight->parts[0].is_floating_point()))
      throw Error("train_all",
                  fmt::format("{} is packed, and codes have no gradient: load the model without "
                              "quantize, or a GGUF file with weights 'dense'; on a packed base "
                              "train an adapter",
                              item.key()));
  }
  for (const auto& item : model.named_parameters()) item.value().set_requires_grad(true);
}

}  // namespace budwood::models
