#include <budwood/peft/json.h>
#include <budwood/peft/methods/vera_config.h>

#include <nlohmann/json.hpp>

namespace budwood {
namespace {

const bool registered = register_config("VERA", [] { return std::make_shared<VeraConfig>(); });

}  // namespace

void VeraConfig::validate(Strictness strictness) const {
  TargetedConfig::validate(strictness);
  require_at_least(*this, "r", r, 1);
  require_at_least(*this, "projection_prng_key", projection_prng_key, 0);
  require_probability(*this, "vera_dropout", vera_dropout);
  require_finite(*this, "d_initial", d_initial);
  require_one_of(*this, "bias", bias, {"none", "all", "vera_only"});
}

std::vector<ConfigField> VeraConfig::fields() {
  auto all = TargetedConfig::fields();
  std::erase_if(all, [](const ConfigField& f) { return f.name == "exclude_modules"; });
  for (auto& field : std::vector<ConfigField>{
           bind_field("r", r), bind_field("projection_prng_key", projection_prng_key),
           bind_field("save_projection", save_projection), bind_field("vera_dropout", vera_dropout),
           bind_field("d_initial", d_initial), bind_field("bias", bias),
           bind_field("init_weights", init_weights)})
    all.push_back(std::move(field));
  return all;
}

}  // namespace budwood
