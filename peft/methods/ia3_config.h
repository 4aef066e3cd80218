#pragma once

#include <budwood/peft/methods/targeted_config.h>

namespace budwood {

/// IA3 (arXiv 2205.05638): learned factors of keys, values and feed-forward activations.
struct IA3Config : TargetedConfig {
  IA3Config() : TargetedConfig("IA3") {}

  /// Which of the targets scale their input instead of their output: names or a regular expression.
  /// Nothing given and no targets given: the model's default.
  Names feedforward_modules;
  bool init_ia3_weights = true;  ///< false: random factors, only for tests

  /// Whether the module at a path scales its input. As in HF PEFT a name need not start at a dot.
  bool is_feedforward(const std::string& path) const;

  void resolve(const Names& resolved, const std::vector<std::string>& paths,
               std::string_view model_type) override;
  void validate(Strictness strictness = Strictness::strict) const override;
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<IA3Config>(*this);
  }
  std::vector<ConfigField> fields() override;
};

}  // namespace budwood
