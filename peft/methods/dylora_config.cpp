#include <budwood/peft/json.h>
#include <budwood/peft/methods/dylora_config.h>

#include <nlohmann/json.hpp>

namespace budwood {
namespace {

const bool registered = register_config("DYLORA", [] { return std::make_shared<DyLoraConfig>(); });

}  // namespace

void DyLoraConfig::validate(Strictness strictness) const {
  TargetedConfig::validate(strictness);
  require_at_least(*this, "r", r, 1);
  require_at_least(*this, "r_min", r_min, 1);
  require_option(*this, r_min <= r, "r_min", std::to_string(r_min),
                 "at most r = " + std::to_string(r));
  require_at_least(*this, "eval_rank", eval_rank, 0);
  require_option(*this, eval_rank <= r, "eval_rank", std::to_string(eval_rank),
                 "at most r = " + std::to_string(r));
  require_finite(*this, "lora_alpha", lora_alpha);
  require_probability(*this, "lora_dropout", lora_dropout);
}

std::vector<ConfigField> DyLoraConfig::fields() {
  auto all = TargetedConfig::fields();
  auto alpha = bind_field("lora_alpha", lora_alpha);
  alpha.write = [this] { return write_number(lora_alpha); };
  for (auto& field : std::vector<ConfigField>{
           bind_field("r", r), bind_field("r_min", r_min), std::move(alpha),
           bind_field("lora_dropout", lora_dropout), bind_field("frozen", frozen),
           bind_field("rank_seed", rank_seed), bind_field("eval_rank", eval_rank)})
    all.push_back(std::move(field));
  return all;
}

}  // namespace budwood
