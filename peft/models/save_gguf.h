#pragma once

#include <budwood/peft/models/model.h>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace budwood::models {

struct SaveGgufOptions {
  /// Type of matrices: "f32", "f16", "bf16", "q8_0", "q4_1" or "q4_0". Vectors are F32.
  std::string type = "q8_0";
  /// Type of the token table and the head; empty = Q8_0 where matrices have 4 bits, else theirs.
  std::string embedding_type = "";
  /// Folder or GGUF file whose tokeniser goes into the metadata; empty = none ("no_vocab").
  std::string tokenizer_from = "";
  /// general.name; empty = not written.
  std::string name = "";
};

struct SavedGgufTensor {
  std::string name;  ///< in the file
  std::string type;  ///< "Q4_1"
  std::vector<int64_t> shape;
  uint64_t bytes = 0;
  bool copied = false;  ///< blocks taken as they were
};

struct SaveGgufReport {
  std::vector<SavedGgufTensor> tensors;  ///< in the order of the file
  std::vector<std::string> warnings;
  /// Tensors of each type.
  std::map<std::string, int64_t> types() const;
};

/// The model as a GGUF file that llama.cpp runs: Llama and Mistral as architecture "llama", Qwen2,
/// Qwen3. Blocks that have the wanted type already are copied; everything else goes through
/// float32, some rows at a time. Rows that are no whole blocks of the type are F16, with a warning
/// that names the tensor. Adapters must be merged or detached before. A value that is not finite or
/// too large for its type is an Error that names the tensor; the file appears whole or not at all.
SaveGgufReport save_gguf(CausalLM& model, const std::string& path,
                         const SaveGgufOptions& options = {});

}  // namespace budwood::models
