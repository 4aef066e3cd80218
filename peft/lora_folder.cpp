#include <ATen/ATen.h>

#include <budwood/peft/io/file.h>
#include <budwood/peft/lora_folder.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/tensor_file.h>
#include <algorithm>

namespace budwood {

void write_lora_folder(const std::filesystem::path& out, LoraConfig& config,
                       const std::vector<LoraFactors>& modules, bool overwrite) {
  config.r = 0;
  for (const auto& module : modules) config.r = std::max(config.r, module.a.size(0));
  config.lora_alpha = static_cast<double>(config.r);
  config.inference_mode = true;
  NamedTensors tensors;
  for (const auto& [path, a, b, table] : modules) {
    const auto key = "base_model.model." + path;
    tensors.emplace_back(key + (table ? ".lora_embedding_A" : ".lora_A.weight"), a);
    tensors.emplace_back(key + (table ? ".lora_embedding_B" : ".lora_B.weight"), b);
    if (a.size(0) == config.r) continue;
    config.rank_pattern.emplace_back(path, a.size(0));
    config.alpha_pattern.emplace_back(path, static_cast<double>(a.size(0)));
  }
  io::AtomicFolder folder(out, overwrite ? io::Existing::replace : io::Existing::refuse);
  io::write_file(folder.path() / "adapter_config.json", config.to_json());
  write_tensors(folder.path() / "adapter_model.safetensors", tensors);
  folder.commit();
}

}  // namespace budwood
