#include <budwood/peft/io/text.h>
#include <budwood/peft/json.h>
#include <budwood/peft/methods/targeted_config.h>
#include <budwood/peft/targets.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace budwood {

void TargetedConfig::resolve(const Names& resolved, const std::vector<std::string>& /*paths*/,
                             std::string_view /*model_type*/) {
  target_modules = resolved;
}

void TargetedConfig::validate(Strictness strictness) const {
  AdapterConfig::validate(strictness);
  validate_targets(*target_rules(), peft_type);
}

std::optional<TargetRules> TargetedConfig::target_rules() const {
  return TargetRules{target_modules, exclude_modules, layers_to_transform, layers_pattern, {}};
}

std::vector<ConfigField> TargetedConfig::fields() {
  auto all = AdapterConfig::fields();
  for (auto& field :
       std::vector<ConfigField>{bind_field("target_modules", target_modules),
                                bind_field("exclude_modules", exclude_modules),
                                bind_field("layers_to_transform", layers_to_transform),
                                bind_field("layers_pattern", layers_pattern),
                                bind_field("fan_in_fan_out", fan_in_fan_out)})
    all.push_back(std::move(field));
  return all;
}

void require_option(const AdapterConfig& config, bool holds, std::string_view option,
                    const std::string& value, std::string_view wanted) {
  if (!holds)
    throw Error(config.peft_type + " config",
                fmt::format("{} is {}; it must be {}", option, value, wanted));
}

void require_at_least(const AdapterConfig& config, std::string_view option, int64_t value,
                      int64_t least) {
  constexpr int64_t most = int64_t{1} << 24;
  require_option(config, value >= least && value <= most, option, std::to_string(value),
                 fmt::format("an integer from {} to {}", least, most));
}

void require_probability(const AdapterConfig& config, std::string_view option, double value) {
  require_option(config, value >= 0 && value < 1, option, fmt::format("{}", value),
                 "a number p with 0 <= p < 1");
}

void require_finite(const AdapterConfig& config, std::string_view option, double value) {
  require_option(config, std::isfinite(value), option, fmt::format("{}", value), "a finite number");
}

void require_one_of(const AdapterConfig& config, std::string_view option, const std::string& value,
                    const std::vector<std::string>& known) {
  require_option(config, std::find(known.begin(), known.end(), value) != known.end(), option,
                 io::in_quotes(value), fmt::format("one of {}", fmt::join(known, ", ")));
}

}  // namespace budwood
