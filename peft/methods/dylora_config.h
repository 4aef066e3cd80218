#pragma once

#include <budwood/peft/methods/targeted_config.h>

namespace budwood {

/// DyLoRA (arXiv 2210.07558): LoRA whose leading b rows work at every rank b <= r. Each training
/// step draws one rank.
struct DyLoraConfig : TargetedConfig {
  DyLoraConfig() : TargetedConfig("DYLORA") {}

  int64_t r = 8;
  int64_t r_min = 1;  ///< the smallest rank that is drawn
  double lora_alpha = 8;
  double lora_dropout = 0.0;
  bool frozen = false;    ///< of the ranks below the drawn one nothing is learned in that step
  int64_t rank_seed = 0;  ///< seed of the ranks that are drawn
  int64_t eval_rank = 0;  ///< rank outside training; 0 = r

  void validate(Strictness strictness = Strictness::strict) const override;
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<DyLoraConfig>(*this);
  }
  std::vector<ConfigField> fields() override;
};

}  // namespace budwood
