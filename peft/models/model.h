#pragma once

#include <torch/nn/module.h>

#include <budwood/quant/weight.h>
#include <budwood/peft/models/batch.h>
#include <budwood/peft/models/blocks.h>
#include <budwood/peft/models/config.h>
#include <budwood/peft/models/kv_cache.h>
#include <memory>
#include <string>
#include <optional>
#include <vector>

namespace budwood::models {

/// Sum of the token losses and how many tokens were counted; mean loss = sum / count.
struct LossSum {
  at::Tensor sum;  ///< scalar, fp32, differentiable
  int64_t count = 0;
};

/// A causal language model built from slots. Module paths are transformers' own
/// (`model.layers.0.self_attn.q_proj`), so adapter files fit without renaming.
class CausalLM : public torch::nn::Module {
 public:
  explicit CausalLM(ModelConfig config) : config_(std::move(config)) {}

  const ModelConfig& config() const { return config_; }

  /// Hidden states after the final norm [tokens, hidden]. With a cache, the batch continues the
  /// cached sequences and its keys and values are appended.
  virtual at::Tensor hidden(const TokenBatch& batch, KvCache* cache = nullptr) = 0;
  /// Hidden states [..., hidden] -> logits [..., vocabulary].
  virtual at::Tensor logits(const at::Tensor& hidden) = 0;

  /// ids int64 [n, t] -> logits [n, t, vocabulary].
  at::Tensor forward(const at::Tensor& ids);

  /// Next-token cross-entropy, summed. labels int64 [tokens]: labels[i] is the token that position
  /// i must predict (already shifted), -100 = ignored. No logits of all tokens are ever held: the
  /// head is applied to counted positions only, in chunks.
  LossSum loss(const TokenBatch& batch, const at::Tensor& labels);

  /// Parameters that require grad and are used by logits() alone.
  virtual std::vector<at::Tensor> head_parameters() const = 0;
  /// The whole of logits() when that is one frozen matrix: no bias, no adapter.
  virtual std::optional<quant::Weight> plain_head() const { return {}; }
  /// dtype of activations.
  virtual at::ScalarType dtype() const = 0;

  /// Token embeddings [tokens, hidden], what the first block reads.
  virtual at::Tensor embed(const TokenBatch& batch);
  /// The blocks in order, the last of them the final norm with the head. They share the model's
  /// modules. Throws Error for a model that does not come in blocks.
  virtual std::vector<Block> blocks();

 private:
  ModelConfig config_;
};

}  // namespace budwood::models
