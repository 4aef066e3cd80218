#pragma once

#include <torch/nn/module.h>

#include <budwood/peft/inject.h>
#include <filesystem>
#include <memory>
#include <string>

/// Folders of AdapterHub's library `adapters` (1.3): adapter_config.json beside adapter.safetensors
/// or pytorch_adapter.bin. Bottleneck, parallel and Compacter adapters, prefix and prompt tuning;
/// LoRA is read and written by convert.h.
namespace budwood {

/// Whether a folder's adapter_config.json is AdapterHub's.
bool is_adapterhub_folder(const std::filesystem::path& folder);

/// What an AdapterHub configuration (the text of adapter_config.json) is here. What is not
/// available (inverse and cross adapters, LoRA, ...) is an Error that names it.
std::shared_ptr<AdapterConfig> adapterhub_config(const std::string& text);

/// Copies the tensors of such a folder into an attached adapter that was made from its
/// configuration.
void read_adapterhub(torch::nn::Module& model, const std::string& folder, const std::string& name);
/// Injects what such a folder holds. A .bin is read without executing anything. load_adapter()
/// comes here by itself.
InjectReport load_adapterhub(torch::nn::Module& model, const std::string& folder,
                             const std::string& name = "default");

/// Writes an attached adapter as such a folder, under its name, with safetensors; `adapters` loads
/// it with use_safetensors=True. Throws for a method that AdapterHub does not have.
void save_adapterhub(torch::nn::Module& model, const std::string& folder,
                     const std::string& name = "default");

}  // namespace budwood
