#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/inject.h>
#include <budwood/peft/models/batch.h>
#include <budwood/peft/models/compare_logits.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <random>

namespace budwood::models {
namespace {

at::Tensor logits_of(CausalLM& model, const at::Tensor& ids) {
  model.eval();
  return model.logits(model.hidden(TokenBatch::from_rows(ids))).to(at::kDouble);
}

}  // namespace

std::shared_ptr<CausalLM> load_adapted(const std::string& path,
                                       const std::vector<MergeSource>& adapters,
                                       const LoadOptions& options,
                                       std::vector<std::string>& warnings) {
  auto model = load(path, options);
  std::vector<std::string> names;
  for (size_t i = 0; i < adapters.size(); ++i) {
    const auto& name = names.emplace_back(fmt::format("adapter{}", i));
    const auto report = load_adapter(*model, adapters[i].path, name);
    warnings.insert(warnings.end(), report.warnings.begin(), report.warnings.end());
    for (const auto& module : model->modules())
      if (const auto* slot = dynamic_cast<Slot*>(module.get()))
        if (const auto adapter = slot->adapter(name)) adapter->set_weight(adapters[i].weight);
  }
  return model;
}

LogitsComparison compare_logits(const std::string& model, const std::vector<MergeSource>& adapters,
                                const std::string& merged, std::vector<int64_t> ids,
                                int64_t count) {
  const at::NoGradGuard no_grad;
  const auto config = read_config(merged);
  if (ids.empty()) {
    std::mt19937_64 random(1);
    for (int64_t i = 0; i < std::min(count, config.max_position_embeddings); ++i)
      ids.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(config.vocab_size)));
  }
  for (const auto id : ids)
    if (id < 0 || id >= config.vocab_size)
      throw Error("verify", fmt::format("the token {} is not in the vocabulary of {}", id,
                                        config.vocab_size));
  if (ids.empty()) throw Error("verify", "there are no tokens to compare logits of");
  const auto row = at::tensor(ids, at::kLong).unsqueeze(0);
  at::Tensor wanted;
  {
    std::vector<std::string> warnings;
    auto adapted = load_adapted(model, adapters, {.dtype = "float32"}, warnings);
    wanted = logits_of(*adapted, row);
  }
  const auto found = logits_of(*load(merged, {.dtype = "float32"}), row);
  if (found.sizes() != wanted.sizes())
    throw Error("verify", fmt::format("the models have {} and {} logits for a token",
                                      wanted.size(-1), found.size(-1)));
  LogitsComparison comparison{.tokens = static_cast<int64_t>(ids.size())};
  comparison.difference = (found - wanted).abs().max().item<double>();
  comparison.size = wanted.abs().max().item<double>();
  comparison.agreement =
      found.argmax(-1).eq(wanted.argmax(-1)).to(at::kDouble).mean().item<double>();
  return comparison;
}

}  // namespace budwood::models
