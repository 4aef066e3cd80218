#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace budwood::models {

/// Keys and values of every layer for one batch of sequences of equal length, growing at the end.
/// Storage doubles when it is full, so a token costs no copy of what came before.
class KvCache {
 public:
  explicit KvCache(int64_t layers) : layers_(layers) {}

  /// Tokens cached so far in each sequence.
  int64_t length() const { return length_; }

  /// Appends k, v [sequences, new, heads, head_dim] to a layer and returns all of them,
  /// [sequences, length + new, heads, head_dim], as views of the storage.
  std::pair<at::Tensor, at::Tensor> append(int64_t layer, const at::Tensor& k, const at::Tensor& v);
  /// Called once after all layers have appended the same number of tokens.
  void advance(int64_t tokens) { length_ += tokens; }

 private:
  struct Layer {
    at::Tensor k, v;
  };
  std::vector<Layer> store_;
  int64_t layers_;
  int64_t length_ = 0;
};

}  // namespace budwood::models
