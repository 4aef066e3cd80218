#pragma once

#include <budwood/peft/convert/lora_set.h>

#include <filesystem>
#include <vector>

namespace budwood {

struct LoraConfig;

/// Writes factors as an adapter folder in HF PEFT's layout, whole or not at all. Sets the ranks,
/// the alphas that give the modules' scalings, use_dora and inference_mode in `config`.
void write_lora_folder(const std::filesystem::path& out, LoraConfig& config,
                       const std::vector<LoraModule>& modules, bool overwrite);

}  // namespace budwood
