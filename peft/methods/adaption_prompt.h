#pragma once

#include <budwood/peft/attention_adapter.h>
#include <budwood/peft/methods/prompt_config.h>

namespace budwood {

/// LLaMA-Adapter (arXiv 2303.16199): P [1, T, hidden] goes through the layer's own key and value
/// projections, the queries attend to it with a softmax of its own, and gate [1], which starts at
/// 0, times the result is added to the attention's.
class AdaptionPrompt final : public AttentionAdapter {
 public:
  AdaptionPrompt(std::shared_ptr<const AdaptionPromptConfig> config, int64_t hidden, uint64_t seed);

  at::Tensor beside(const Around& around) const override;
  AdapterState state() const override {
    return {{"adaption_gate", gate_}, {"adaption_prompt", prompt_}};
  }
  int64_t rank() const override { return prompt_.size(1); }

 private:
  at::Tensor prompt_, gate_;
};

}  // namespace budwood
