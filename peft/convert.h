#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

/// LoRA adapters from one library's files to another's.
namespace budwood {

struct ConvertOptions {
  /// A folder of HF PEFT, AdapterHub or MLX, or llama.cpp's GGUF file; told apart by what is in it.
  std::filesystem::path adapter;
  std::string to = "peft";  ///< "peft", "adapterhub", "mlx" or "gguf"
  /// The base model, folder or GGUF file; only its configuration and shapes are read. Needed for
  /// "gguf" and "adapterhub", and to read GGUF adapters of architecture "llama", whose rows of q
  /// and k are permuted by heads.
  std::filesystem::path model;
  std::filesystem::path out;  ///< a folder, for "gguf" a file; written whole or not at all
  bool overwrite = false;
};

struct ConvertReport {
  std::string from;  ///< "peft", ...
  int64_t modules = 0;
  int64_t parameters = 0;
  std::vector<std::string> warnings;
};

/// Each module keeps its change of weights, scaling · B A. Where a format has no place for the
/// scalings of rsLoRA and of patterns, they are multiplied into B; where it has one rank for all
/// modules, factors are filled up with zeros. What a format cannot hold (DoRA in GGUF, a bias, a
/// layer that was trained whole, the places AdapterHub has no LoRA for) is an Error that lists it.
ConvertReport convert(const ConvertOptions& options);

}  // namespace budwood
