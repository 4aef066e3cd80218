#pragma once

#include <budwood/peft/models/batch.h>
#include <budwood/peft/models/kv_cache.h>
#include <budwood/peft/slot.h>
#include <functional>

namespace budwood::models {

/// What is fixed about the attention of one layer.
struct AttentionPart {
  int64_t layer = 0;
  int64_t window = 0;  ///< keys a query sees, itself included; 0 = all
  bool causal = true;
  bool adds_beside = true;  ///< false: the caller asks the slot for what attends beside
};

/// 1 / sqrt(head_dim).
double attention_scale(int64_t head_dim);

/// Attention of a batch with what adapters and a cache put before its keys, and beside it. q
/// [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], rotated where a model does so
/// -> [tokens, heads, head_dim]. `project` as in AttentionAdapter::Around; `hidden`
/// gives the states that the attention reads, for the gate of a prefix. A cache keeps the prefix as
/// the tokens that start it gate it.
at::Tensor attend(const AttentionPart& part, const AttentionSlot& adapters, const at::Tensor& q,
                  at::Tensor k, at::Tensor v, const TokenBatch& batch, KvCache* cache,
                  const std::function<KeyValues(const at::Tensor&)>& project,
                  const std::function<at::Tensor()>& hidden);

/// Keys that adapters put before those of each sequence.
int64_t prefix_tokens(const AttentionSlot& adapters);
/// Throws Error unless all sequences of a batch have one length, as those that share a cache must.
void require_one_length(const TokenBatch& batch);
/// Positions of a batch's tokens in view of these. In a batch that continues a cache they count
/// from the cache's length, which includes such keys.
at::Tensor token_positions(const AttentionSlot& adapters, const TokenBatch& batch, bool from_start);

}  // namespace budwood::models
