#pragma once

#include <budwood/peft/methods/targeted_config.h>

namespace budwood {

/// VeRA (arXiv 2310.11454): one frozen random pair of factors for all places, and two learned
/// vectors at each.
struct VeraConfig : TargetedConfig {
  VeraConfig() : TargetedConfig("VERA") {}

  int64_t r = 256;
  int64_t projection_prng_key = 0;  ///< seed of the frozen factors
  bool save_projection = true;      ///< the frozen factors are saved along
  double vera_dropout = 0.0;
  double d_initial = 0.1;     ///< where the vector of rank r starts
  std::string bias = "none";  ///< "none", "all" or "vera_only"
  bool init_weights = true;   ///< false: both vectors are random, only for tests

  void validate(Strictness strictness = Strictness::strict) const override;
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<VeraConfig>(*this);
  }
  std::vector<ConfigField> fields() override;
};

}  // namespace budwood
