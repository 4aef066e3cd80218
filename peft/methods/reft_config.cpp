#include <budwood/peft/json.h>
#include <budwood/peft/methods/reft_config.h>

#include <nlohmann/json.hpp>

namespace budwood {
namespace {

const bool registered = register_config("REFT", [] { return std::make_shared<ReftConfig>(); });

}  // namespace

void ReftConfig::validate(Strictness strictness) const {
  AdapterConfig::validate(strictness);
  require_at_least(*this, "r", r, 1);
  require_one_of(*this, "variant", variant, {"loreft", "noreft", "direft"});
  require_at_least(*this, "prefix_positions", prefix_positions, 0);
  require_at_least(*this, "suffix_positions", suffix_positions, 0);
  require_option(*this, prefix_positions + suffix_positions > 0, "prefix_positions", "0",
                 "above 0 when suffix_positions is 0: else nothing is edited");
  require_probability(*this, "dropout", dropout);
}

std::vector<ConfigField> ReftConfig::fields() {
  auto all = AdapterConfig::fields();
  for (auto& field : std::vector<ConfigField>{
           bind_field("r", r), bind_field("variant", variant), bind_field("layers", layers),
           bind_field("prefix_positions", prefix_positions),
           bind_field("suffix_positions", suffix_positions),
           bind_field("tied_weights", tied_weights), bind_field("dropout", dropout),
           bind_field("identity_init", identity_init)})
    all.push_back(std::move(field));
  return all;
}

}  // namespace budwood
