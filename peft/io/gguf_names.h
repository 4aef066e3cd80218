#pragma once

#include <cstdint>
#include <optional>
#include <string>

/// What tensors and rows of transformers' models are called in GGUF files, and the reverse.
namespace budwood::io {

/// "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight"; throws for a name GGUF has not.
std::string gguf_name(const std::string& name);
/// The inverse; nothing for a name that transformers has no tensor for.
std::optional<std::string> name_from_gguf(const std::string& name);

/// Divisors of the rotary frequencies, which have no name in transformers.
inline constexpr const char* kRopeDivisors = "rope_freqs.weight";
/// Sorts a file's tensors: the token table, those divisors, the layers by number, the rest.
int64_t gguf_place(const std::string& name);

/// Whether a tensor's rows are permuted in files of architecture "llama"; name is transformers'.
bool rotary_rows(const std::string& name);
/// Files of architecture "llama" rotate neighbours (2i, 2i + 1) of a head, transformers halves
/// (i, i + d/2): where row `row` of a head's rows goes in such a file.
constexpr int64_t row_in_gguf(int64_t row, int64_t head_dim) {
  const int64_t in_head = row % head_dim, half = head_dim / 2;
  return row - in_head + (in_head < half ? 2 * in_head : 2 * (in_head - half) + 1);
}

}  // namespace budwood::io
