#include <budwood/peft/convert/lora_set.h>
#include <budwood/peft/lora_folder.h>
#include <budwood/peft/merge/adapter_file.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

/// HF PEFT's folders.
namespace budwood {
namespace {

namespace fs = std::filesystem;

LoraSet read_peft(const fs::path& path, const ConvertBase&) {
  const auto file = AdapterFile::open(path);
  const auto& config = file.config();
  LoraSet set{.base_model = config.base_model_name_or_path,
              .task_type = config.task_type,
              .warnings = config.warnings};
  std::vector<std::string> beyond;  // what is no product of two factors
  for (const auto& [name, tensor] : file.whole()) {
    // HF PEFT keeps a copy of the base's table beside the factors of one.
    const auto module = name.substr(0, name.rfind('.'));
    const auto& kept = config.modules_to_save;
    const bool saved = kept && std::any_of(kept->begin(), kept->end(), [&](const auto& one) {
                         return module == one || module.ends_with("." + one);
                       });
    if (file.modules().contains(module) && !saved)
      set.warnings.push_back(name + " is the base's table, and is left out");
    else
      beyond.push_back(name + " (trained whole)");
  }
  for (const auto& [name, tensor] : file.token_rows()) beyond.push_back(name + " (single tokens)");
  for (const auto& [name, table] : file.modules()) {
    auto term = file.term(name);
    if (term.inner_bias.defined()) beyond.push_back(name + " (bias of B)");
    if (term.gain.defined() || term.input_gain.defined() || !term.a.defined() || term.leading_a) {
      beyond.push_back(fmt::format("{} ({})", name, config.peft_type));
      continue;
    }
    set.modules.push_back({name, std::move(term.a), std::move(term.b), term.scaling,
                           std::move(term.magnitude), table});
  }
  if (!beyond.empty())
    throw Error("convert", fmt::format("{} holds what is not a pair of LoRA's factors, and merging "
                                       "is the way to export it:\n  {}",
                                       path.string(), fmt::join(beyond, "\n  ")));
  return set;
}

void write_peft(const fs::path& out, LoraSet& set, const ConvertBase&) {
  LoraConfig config;
  config.base_model_name_or_path = set.base_model;
  config.task_type = set.task_type;
  std::vector<std::string> targets;
  for (const auto& module : set.modules) targets.push_back(module.path);
  std::sort(targets.begin(), targets.end());
  config.target_modules = targets;
  write_lora_folder(out, config, set.modules, /*overwrite=*/true);
}

const bool registered =
    register_lora_format("peft", {.is = is_peft_folder, .read = read_peft, .write = write_peft});

}  // namespace
}  // namespace budwood
