#pragma once

#include <budwood/peft/models/gguf_config.h>
#include <string>
#include <vector>

namespace budwood::models {

/// What a GGUF file says of itself beside the model's configuration.
struct GgufDescription {
  std::string name;                       ///< general.name; empty = not written
  io::GgmlType type = io::GgmlType::f32;  ///< of most matrices
  bool blocks = false;                    ///< some tensors are quantised
  std::string tokenizer_from;             ///< folder or GGUF file; empty = none
};

/// llama.cpp's general.file_type for "mostly this type". Throws for types that are not written.
uint32_t gguf_file_type(io::GgmlType type);

/// All keys of a file. What they cannot say is added to `warnings`.
io::GgufMetadata gguf_metadata(const ModelConfig& config, const GgufConfig& described,
                               const GgufDescription& description,
                               std::vector<std::string>& warnings);

}  // namespace budwood::models
