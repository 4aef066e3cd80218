#include <budwood/peft/json.h>
#include <budwood/peft/methods/ia3_config.h>
#include <budwood/peft/pattern.h>
#include <budwood/peft/targets.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace budwood {
namespace {

using List = std::vector<std::string>;

const bool registered = register_config("IA3", [] { return std::make_shared<IA3Config>(); });

}  // namespace

bool IA3Config::is_feedforward(const std::string& path) const {
  if (const auto* text = std::get_if<std::string>(&feedforward_modules))
    return Pattern(*text).full_match(path);
  const auto* list = std::get_if<List>(&feedforward_modules);
  return list && std::any_of(list->begin(), list->end(),
                             [&](const std::string& end) { return path.ends_with(end); });
}

void IA3Config::resolve(const Names& resolved, const List& paths, std::string_view model_type) {
  const bool none = std::holds_alternative<std::monostate>(feedforward_modules);
  const bool usual = std::holds_alternative<std::monostate>(target_modules);
  if (none && usual)
    feedforward_modules = default_feedforward_modules(model_type).value_or(List{});
  else if (none)
    feedforward_modules = List{};
  TargetedConfig::resolve(resolved, paths, model_type);
}

void IA3Config::validate(Strictness strictness) const {
  TargetedConfig::validate(strictness);
  const auto* targets = std::get_if<List>(&target_modules);
  const auto* forward = std::get_if<List>(&feedforward_modules);
  if (targets && forward)
    for (const auto& name : *forward)
      require_option(*this, std::find(targets->begin(), targets->end(), name) != targets->end(),
                     "feedforward_modules", fmt::format("[{}]", fmt::join(*forward, ", ")),
                     fmt::format("a part of target_modules [{}]", fmt::join(*targets, ", ")));
}

std::vector<ConfigField> IA3Config::fields() {
  auto all = TargetedConfig::fields();
  std::erase_if(all, [](const ConfigField& f) {
    return f.name == "layers_to_transform" || f.name == "layers_pattern";
  });
  all.push_back(bind_field("feedforward_modules", feedforward_modules));
  all.push_back(bind_field("init_ia3_weights", init_ia3_weights));
  return all;
}

}  // namespace budwood
