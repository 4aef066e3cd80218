#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace budwood::models {

/// Keys and values of all tokens of a batch, layer by layer: kept by one forward, and read by
/// another that computes some of the tokens anew, with gradients (selected.h).
struct KeyValueTape {
  /// int64 [selected], rising: rows of the whole batch that a forward computes. Undefined while the
  /// whole batch is computed and kept.
  at::Tensor rows;
  at::Tensor positions;             ///< of the whole batch, int64 [tokens]
  std::vector<int64_t> cu_seqlens;  ///< likewise
  struct Layer {
    at::Tensor k, v;  ///< [tokens, kv_heads, head_dim], rotated where a model does so
  };
  std::vector<Layer> layers;
};

}  // namespace budwood::models
