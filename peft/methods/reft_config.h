#pragma once

#include <budwood/peft/methods/targeted_config.h>

namespace budwood {

/// ReFT (arXiv 2404.03592): edits of the hidden states after blocks, at chosen positions.
///
///   h' = h + Rᵀ (M h + c - R h)     loreft: R [r, hidden] has orthonormal rows
///                                   noreft: R is free; direft: h + Rᵀ (M h + c), R free
struct ReftConfig : AdapterConfig {
  ReftConfig() : AdapterConfig("REFT") {}

  int64_t r = 4;
  std::string variant = "loreft";              ///< or "noreft", "direft"
  std::optional<std::vector<int64_t>> layers;  ///< nothing = all
  int64_t prefix_positions = 3;                ///< so many first tokens of the prompt are edited
  int64_t suffix_positions = 0;                ///< and so many last ones
  bool tied_weights = false;                   ///< one edit for both groups of positions
  double dropout = 0.0;                        ///< of the edit, never of h
  bool identity_init = true;                   ///< M = R and c = 0; false: M as a Linear starts

  void validate(Strictness strictness = Strictness::strict) const override;
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<ReftConfig>(*this);
  }
  std::vector<ConfigField> fields() override;
};

}  // namespace budwood
