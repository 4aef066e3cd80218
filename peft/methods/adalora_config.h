#pragma once

#include <budwood/peft/methods/lora_config.h>

#include <map>

namespace budwood {

/// AdaLoRA (arXiv 2303.10512): factors in the shape of a singular value decomposition, whose rank
/// budget moves between places while they are trained. `r` and `rank_pattern` of LoRA are not used.
struct AdaLoraConfig : LoraConfig {
  AdaLoraConfig() : LoraConfig("ADALORA") {}

  int64_t init_r = 12;   ///< rank of every place at the start
  int64_t target_r = 8;  ///< average rank at the end
  int64_t tinit = 0;     ///< steps before the budget begins to fall
  int64_t tfinal = 0;    ///< steps at the end with the ranks as they are
  int64_t deltaT = 1;    ///< steps between two allocations
  double beta1 = 0.85, beta2 = 0.85;
  double orth_reg_weight = 0.5;
  std::optional<int64_t> total_step;  ///< must be given
  /// After allocation: for each place, which of its init_r triplets are kept; keys end in
  /// ".lora_E".
  RawJson kept;

  /// What multiplies B (E ∘ A).
  double scale() const;
  /// kept by the path of the place; empty = nothing was allocated yet.
  std::map<std::string, std::vector<bool>> kept_by_path() const;
  void set_kept(const std::map<std::string, std::vector<bool>>& kept);

  void resolve(const Names& resolved, const std::vector<std::string>& paths,
               std::string_view model_type) override;
  void validate(Strictness strictness = Strictness::strict) const override;
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<AdaLoraConfig>(*this);
  }
  std::vector<ConfigField> fields() override;
};

}  // namespace budwood
