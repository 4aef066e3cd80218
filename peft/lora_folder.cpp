#include <budwood/peft/convert/factors_file.h>
#include <budwood/peft/io/file.h>
#include <budwood/peft/lora_folder.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

namespace budwood {

void write_lora_folder(const std::filesystem::path& out, LoraConfig& config,
                       const std::vector<LoraModule>& modules, bool overwrite) {
  config.r = largest_rank(modules);
  config.lora_alpha = common_scaling(modules).value_or(1.0) * static_cast<double>(config.r);
  config.use_dora = any_magnitude(modules);
  config.inference_mode = true;
  std::vector<std::pair<std::string, FloatArray>> arrays;
  for (const auto& module : modules) {
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
  io::AtomicFolder folder(out, overwrite ? io::Existing::replace : io::Existing::refuse);
  io::write_file(folder.path() / "adapter_config.json", config.to_json());
  write_factors(folder.path() / "adapter_model.safetensors", arrays, {{"format", "pt"}});
  folder.commit();
}

}  // namespace budwood
