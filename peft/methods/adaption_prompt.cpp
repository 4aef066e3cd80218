#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/method.h>
#include <budwood/peft/methods/adaption_prompt.h>
#include <budwood/quant/error.h>

namespace budwood {

AdaptionPrompt::AdaptionPrompt(std::shared_ptr<const AdaptionPromptConfig> config, int64_t hidden,
                               uint64_t seed)
    : AttentionAdapter(config) {
  prompt_ = register_parameter(
      "adaption_prompt",
      at::empty({1, *config->adapter_len, hidden}, at::kFloat).normal_(0.0, 1.0, stream(seed)));
  gate_ = register_parameter("adaption_gate", at::zeros({1}));
}

at::Tensor AdaptionPrompt::beside(const Around& around) const {
  const auto& q = around.q;
  auto [k, v] = around.project(prompt_[0].to(q.scalar_type()));
  const int64_t groups = q.size(1) / k.size(1);
  if (groups > 1) {
    k = k.repeat_interleave(groups, 1);
    v = v.repeat_interleave(groups, 1);
  }
  // [heads, tokens, T]
  const auto scores = at::bmm(q.transpose(0, 1), k.permute({1, 2, 0})) * around.scale;
  const auto shares = at::softmax(scores, -1, at::kFloat) * gate_;
  return at::bmm(shares.to(v.scalar_type()), v.transpose(0, 1)).transpose(0, 1);
}

namespace {

std::vector<Grafted> make(const std::shared_ptr<const AdapterConfig>& config,
                          const std::vector<Place>& places, uint64_t) {
  const auto own = own_config<AdaptionPromptConfig>(config);
  std::vector<size_t> layers;
  for (size_t i = 0; i < places.size(); ++i)
    if (places[i].kind == SlotKind::attention) layers.push_back(i);
  const auto wanted = static_cast<size_t>(*own->adapter_layers);
  if (wanted > layers.size())
    throw Error("inject", fmt::format("adapter_layers is {}, and this model has {} layers", wanted,
                                      layers.size()));
  std::vector<Grafted> made;
  for (size_t i = layers.size() - wanted; i < layers.size(); ++i) {
    const auto& place = places[layers[i]];
    made.push_back({layers[i], std::make_shared<AdaptionPrompt>(own, place.hidden, place.seed)});
  }
  return made;
}

const bool registered = register_method("ADAPTION_PROMPT", {.make = make});

}  // namespace
}  // namespace budwood
