#pragma once

#include <budwood/peft/config.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace budwood {

/// What configurations of methods that choose modules by name have in common.
struct TargetedConfig : AdapterConfig {
  Names target_modules;  ///< "all-linear", a regex, names, or nothing: the model's default
  Names exclude_modules;
  Layers layers_to_transform;
  Names layers_pattern;
  bool fan_in_fan_out = false;  ///< the base stores [in, out]

  void resolve(const Names& resolved, const std::vector<std::string>& paths,
               std::string_view model_type) override;
  void validate(Strictness strictness = Strictness::strict) const override;
  std::optional<TargetRules> target_rules() const override;
  std::vector<ConfigField> fields() override;

 protected:
  using AdapterConfig::AdapterConfig;
};

/// Throws Error "<peft_type> config: option is value; it must be wanted" unless `holds`.
void require_option(const AdapterConfig& config, bool holds, std::string_view option,
                    const std::string& value, std::string_view wanted);
void require_at_least(const AdapterConfig& config, std::string_view option, int64_t value,
                      int64_t least);
/// A number p with 0 <= p < 1.
void require_probability(const AdapterConfig& config, std::string_view option, double value);
void require_finite(const AdapterConfig& config, std::string_view option, double value);
void require_one_of(const AdapterConfig& config, std::string_view option, const std::string& value,
                    const std::vector<std::string>& known);

}  // namespace budwood
