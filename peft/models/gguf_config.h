#pragma once

#include <budwood/peft/io/gguf.h>
#include <budwood/peft/models/config.h>
#include <string>
#include <vector>

/// A model's configuration in the metadata of a GGUF file.
namespace budwood::models {

/// What the metadata of a file describe; throws, naming the key, for what Budwood does not run.
ModelConfig read_gguf_config(const io::GgufFile& file);

struct GgufConfig {
  std::string architecture;  ///< llama (Mistral too), qwen2, qwen3
  io::GgufMetadata keys;     ///< "<architecture>.*"
  /// Values of the tensor rope_freqs.weight; empty = none.
  std::vector<float> rope_divisors;
  /// What other readers of the file do not take up.
  std::vector<std::string> warnings;
};

/// The inverse. Throws for what no key can say.
GgufConfig gguf_config(const ModelConfig& config);

}  // namespace budwood::models
