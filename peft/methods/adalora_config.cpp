#include <budwood/peft/json.h>
#include <budwood/peft/methods/adalora_config.h>
#include <budwood/peft/methods/targeted_config.h>
#include <budwood/quant/error.h>

#include <nlohmann/json.hpp>

namespace budwood {
namespace {

constexpr std::string_view kSuffix = ".lora_E";

const bool registered =
    register_config("ADALORA", [] { return std::make_shared<AdaLoraConfig>(); });

}  // namespace

double AdaLoraConfig::scale() const {
  const auto rank = static_cast<double>(init_r);
  return (lora_alpha > 0 ? lora_alpha : rank) / (rank + 1e-5);
}

std::map<std::string, std::vector<bool>> AdaLoraConfig::kept_by_path() const {
  std::map<std::string, std::vector<bool>> result;
  const auto json = Json::parse(kept.text);
  if (json.is_null()) return result;
  const char* wanted = "rank_pattern maps \"<path>.lora_E\" to a list of booleans";
  if (!json.is_object()) throw Error("ADALORA config", wanted);
  for (const auto& [key, list] : json.items()) {
    if (!list.is_array()) throw Error("ADALORA config", wanted);
    auto path = key;
    if (path.ends_with(kSuffix)) path.resize(path.size() - kSuffix.size());
    auto& flags = result[path];
    for (const auto& flag : list) {
      if (!flag.is_boolean()) throw Error("ADALORA config", wanted);
      flags.push_back(flag.get<bool>());
    }
  }
  return result;
}

void AdaLoraConfig::set_kept(const std::map<std::string, std::vector<bool>>& by_path) {
  Json json = Json::object();
  for (const auto& [path, flags] : by_path) json[path + std::string(kSuffix)] = flags;
  kept.text = by_path.empty() ? "null" : json.dump();
}

void AdaLoraConfig::resolve(const Names& resolved, const std::vector<std::string>& /*paths*/,
                            std::string_view /*model_type*/) {
  target_modules = resolved;
}

void AdaLoraConfig::validate(Strictness strictness) const {
  LoraConfig::validate(strictness);
  require_at_least(*this, "init_r", init_r, 1);
  require_at_least(*this, "target_r", target_r, 0);
  require_at_least(*this, "tinit", tinit, 0);
  require_at_least(*this, "tfinal", tfinal, 0);
  require_at_least(*this, "deltaT", deltaT, 1);
  require_option(*this, total_step.has_value() && *total_step > 0, "total_step",
                 total_step ? std::to_string(*total_step) : "not given",
                 "given: how many optimiser steps the training has");
  require_option(*this, tinit + tfinal < *total_step, "total_step", std::to_string(*total_step),
                 "more than tinit + tfinal = " + std::to_string(tinit + tfinal));
  require_option(*this, target_r <= init_r, "target_r", std::to_string(target_r),
                 "at most init_r = " + std::to_string(init_r));
  require_option(*this, !use_dora, "use_dora", "true", "false");
  require_option(*this, !use_qalora, "use_qalora", "true", "false");
  require_option(*this, !lora_bias, "lora_bias", "true", "false");
  require_finite(*this, "orth_reg_weight", orth_reg_weight);
  require_option(*this, beta1 > 0 && beta1 < 1, "beta1", std::to_string(beta1), "between 0 and 1");
  require_option(*this, beta2 > 0 && beta2 < 1, "beta2", std::to_string(beta2), "between 0 and 1");
  kept_by_path();
}

std::vector<ConfigField> AdaLoraConfig::fields() {
  auto all = LoraConfig::fields();
  // The key is LoRA's, what stands there is not.
  std::erase_if(all, [](const ConfigField& f) { return f.name == "rank_pattern"; });
  for (auto& field : std::vector<ConfigField>{
           bind_field("rank_pattern", kept), bind_field("init_r", init_r),
           bind_field("target_r", target_r), bind_field("tinit", tinit),
           bind_field("tfinal", tfinal), bind_field("deltaT", deltaT), bind_field("beta1", beta1),
           bind_field("beta2", beta2), bind_field("orth_reg_weight", orth_reg_weight),
           bind_field("total_step", total_step)})
    all.push_back(std::move(field));
  return all;
}

}  // namespace budwood
