#pragma once

#include <budwood/peft/models/model.h>

#include <cstdint>

namespace budwood::train {

/// What a training run is expected to hold at its highest, in bytes.
struct MemoryPlan {
  int64_t process = 0;    ///< the program and its libraries, as measured now
  int64_t weights = 0;    ///< the frozen base, shared tensors once
  int64_t mapped = 0;     ///< that part of the weights that lies in a file's pages: processes that
                          ///< read the same file share it
  int64_t adapters = 0;   ///< what requires grad
  int64_t gradients = 0;  ///< of what requires grad
  int64_t optimizer = 0;  ///< what it remembers: moments
  int64_t activations = 0;  ///< kept from the forward for the backward
  int64_t workspace = 0;    ///< comes and goes: logits of a chunk, gradients of activations

  /// Without `mapped`, which is part of the weights.
  int64_t total() const;
};

/// The plan for batches of `tokens` tokens with AdamW, for the model with its adapters as they are
/// now.
MemoryPlan plan_memory(const models::CausalLM& model, int64_t tokens);

}  // namespace budwood::train
