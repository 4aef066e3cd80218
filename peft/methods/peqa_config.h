#pragma once

#include <budwood/peft/methods/targeted_config.h>

namespace budwood {

/// PEQA (arXiv 2305.14152): the scales of integer weights are trained, their codes stay.
struct PeqaConfig : TargetedConfig {
  PeqaConfig() : TargetedConfig("PEQA") {}

  bool train_zeros = false;  ///< the zero points, too

  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<PeqaConfig>(*this);
  }
  std::vector<ConfigField> fields() override;
};

}  // namespace budwood
