#pragma once

#include <budwood/peft/models/batch.h>
#include <budwood/peft/slot.h>
#include <utility>

namespace budwood::models {

/// A batch as the virtual tokens of the slot's active adapters make it, and labels [tokens]
/// (undefined = none) with it; see CausalLM::with_virtual_tokens.
std::pair<TokenBatch, at::Tensor> with_virtual_tokens(const InputSlot& input,
                                                      const TokenBatch& batch,
                                                      const at::Tensor& labels);

}  // namespace budwood::models
