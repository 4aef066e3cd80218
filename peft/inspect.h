#pragma once

#include <filesystem>
#include <string>

namespace budwood {

/// What a file or folder is, as JSON text. "kind" is one of
///   adapter      method, targets, ranks, alphas, scalings, dtype, parameters, modules with norms
///   safetensors  metadata, tensors
///   gguf         architecture, metadata (long arrays by length), tensors
///   model        config of a Hugging Face folder, tensors, shards
/// Tensors come as {name, dtype, shape, bytes}. Nothing but headers is read, except an adapter's
/// own tensors. Throws Error for what is none of these or is damaged.
std::string inspect(const std::filesystem::path& path);

}  // namespace budwood
