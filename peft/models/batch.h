#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/peft/block_adapter.h>
#include <cstdint>
#include <memory>
#include <vector>

namespace budwood::models {

struct KeyValueTape;

/// Token sequences laid end to end, without padding: the one form in which models take input.
/// Sequence s occupies [cu_seqlens[s], cu_seqlens[s + 1]); no token sees another sequence.
struct TokenBatch {
  at::Tensor ids;                   ///< int64 [tokens]
  at::Tensor positions;             ///< int64 [tokens], from 0 in each sequence
  std::vector<int64_t> cu_seqlens;  ///< [sequences + 1], starts with 0, ends with tokens
  /// Tokens of each sequence that belong to its prompt, for adapters that go by it; empty = all.
  std::vector<int64_t> prompt = {};
  /// Filled by CausalLM::with_virtual_tokens: each row's own number, or -1 - v where virtual token
  /// v stands (ids has 0 there). Empty = no virtual tokens.
  std::vector<int64_t> virtual_rows = {};
  /// Set by selected.h: where attention keeps the keys and values of this batch, or reads those of
  /// the batch that this one is a part of.
  std::shared_ptr<KeyValueTape> tape = {};

  int64_t tokens() const { return ids.size(0); }
  int64_t sequences() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
  Sequences layout(bool from_start = true) const {
    return {.cu = cu_seqlens, .prompt = prompt, .from_start = from_start};
  }
  /// Longest sequence.
  int64_t longest() const;

  /// Rows [n, t] of equal length.
  static TokenBatch from_rows(const at::Tensor& ids);
  /// Rows [n, t] with a mask of the same shape (1 = token, 0 = padding, at either side); padding is
  /// dropped, so it costs nothing.
  static TokenBatch from_rows(const at::Tensor& ids, const at::Tensor& mask);
  static TokenBatch from_sequences(const std::vector<std::vector<int64_t>>& sequences);
};

}  // namespace budwood::models
