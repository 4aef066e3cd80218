#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <string>
#include <vector>

namespace budwood {

struct LoraConfig;

/// The factors of one module; A [r, in] and B [out, r] in fp32, with scaling 1.
struct LoraFactors {
  std::string path;
  at::Tensor a, b;
  bool table = false;  ///< of a token table: A [r, vocabulary], B [dim, r]
};

/// Writes factors as an adapter folder in HF PEFT's layout, whole or not at all. Sets the ranks,
/// the alphas that make every scaling 1, and inference_mode in `config`.
void write_lora_folder(const std::filesystem::path& out, LoraConfig& config,
                       const std::vector<LoraFactors>& modules, bool overwrite);

}  // namespace budwood
