#include <budwood/peft/convert/factors_file.h>
#include <budwood/peft/convert/lora_set.h>
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
constexpr const char* kWeights = "adapter_model.safetensors";

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
  config.r = set.largest_rank();
  config.lora_alpha = set.common_scaling().value_or(1.0) * static_cast<double>(config.r);
  config.use_dora = set.any_magnitude();
  config.inference_mode = true;
  config.base_model_name_or_path = set.base_model;
  config.task_type = set.task_type;
  std::vector<std::string> targets;
  std::vector<std::pair<std::string, FloatArray>> arrays;
  for (const auto& module : set.modules) {
    targets.push_back(module.path);
    const double alpha = module.scaling * static_cast<double>(module.rank());
    if (module.rank() != config.r) config.rank_pattern.emplace_back(module.path, module.rank());
    if (alpha != config.lora_alpha) config.alpha_pattern.emplace_back(module.path, alpha);
    const auto key = "base_model.model." + module.path;
    arrays.emplace_back(key + (module.table ? ".lora_embedding_A" : ".lora_A.weight"), module.a);
    arrays.emplace_back(key + (module.table ? ".lora_embedding_B" : ".lora_B.weight"), module.b);
    if (module.magnitude.defined())
      arrays.emplace_back(key + ".lora_magnitude_vector", module.magnitude);
    else if (config.use_dora)
      throw Error("convert",
                  fmt::format("{} has no magnitude, and other modules have one", module.path));
  }
  std::sort(targets.begin(), targets.end());
  config.target_modules = targets;
  io::AtomicFolder folder(out, io::Existing::replace);
  io::write_file(folder.path() / "adapter_config.json", config.to_json());
  write_factors(folder.path() / kWeights, arrays, {{"format", "pt"}});
  folder.commit();
}

const bool registered =
    register_lora_format("peft", {.is = is_peft_folder, .read = read_peft, .write = write_peft});

}  // namespace
}  // namespace budwood
