#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace budwood {

/// Where the sequences lie in hidden states [tokens, hidden].
struct Sequences {
  std::vector<int64_t> cu;  ///< [sequences + 1], the first row of each and the end
  /// Tokens of each sequence that belong to its prompt; empty = all of them.
  std::vector<int64_t> prompt = {};
  /// Rows of padding before the first token of each sequence; empty = none.
  std::vector<int64_t> padding = {};
  /// Tokens of each sequence behind that; empty = all its rows.
  std::vector<int64_t> tokens = {};
  /// False while a cache continues sequences that were read before.
  bool from_start = true;
};

/// Means over the tokens of each sequence, padding left out: values [tokens, n] or [batch, t, n] ->
/// [sequences, n]; 0 for a sequence without tokens.
at::Tensor sequence_means(const at::Tensor& values, const Sequences& sequences);

}  // namespace budwood
