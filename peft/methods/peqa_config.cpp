#include <budwood/peft/json.h>
#include <budwood/peft/methods/peqa_config.h>

#include <nlohmann/json.hpp>

namespace budwood {
namespace {

const bool registered = register_config("PEQA", [] { return std::make_shared<PeqaConfig>(); });

}  // namespace

std::vector<ConfigField> PeqaConfig::fields() {
  auto all = TargetedConfig::fields();
  all.push_back(bind_field("train_zeros", train_zeros));
  return all;
}

}  // namespace budwood
