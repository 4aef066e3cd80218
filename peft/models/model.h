#pragma once

#include <torch/nn/module.h>

#include <budwood/peft/described.h>
#include <budwood/peft/models/batch.h>
#include <budwood/peft/models/blocks.h>
#include <budwood/peft/models/config.h>
#include <budwood/peft/models/kv_cache.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/weight.h>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace budwood::models {

/// Sum of the token losses and how many tokens were counted; mean loss = sum / count.
struct LossSum {
  at::Tensor sum;  ///< scalar, fp32, differentiable
  int64_t count = 0;
};

/// A causal language model built from slots. Module paths are transformers' own
/// (`model.layers.0.self_attn.q_proj`), so adapter files fit without renaming.
class CausalLM : public torch::nn::Module, public Described {
 public:
  explicit CausalLM(ModelConfig config);

  const ModelConfig& config() const { return config_; }
  std::string model_type() const override { return config_.model_type; }
  std::string output_embedding() const override { return "lm_head"; }

  /// Hidden states after the final norm [tokens, hidden]. With a cache, the batch continues the
  /// cached sequences and its keys and values are appended. While adapters put virtual tokens into
  /// the sequences, these have rows of their own: see with_virtual_tokens.
  virtual at::Tensor hidden(const TokenBatch& batch, KvCache* cache = nullptr) = 0;
  /// Hidden states [..., hidden] -> logits [..., vocabulary].
  virtual at::Tensor logits(const at::Tensor& hidden) = 0;

  /// The batch as the active adapters' virtual tokens make it, and labels [tokens] with it: -100
  /// for virtual tokens, but what was predicted across them is predicted from the last of them.
  /// Where "end" is a place, it is before the first counted label, or behind the last token without
  /// labels. A batch without virtual tokens, or with them already, stays as it is.
  std::pair<TokenBatch, at::Tensor> with_virtual_tokens(const TokenBatch& batch,
                                                        const at::Tensor& labels = {}) const;

  /// ids int64 [n, t] -> logits [n, t + virtual tokens, vocabulary].
  at::Tensor forward(const at::Tensor& ids);

  /// Next-token cross-entropy, summed. labels int64 [tokens]: labels[i] is the token that position
  /// i must predict (already shifted), -100 = ignored. No logits of all tokens are ever held: the
  /// head is applied to counted positions only, in chunks.
  LossSum loss(const TokenBatch& batch, const at::Tensor& labels);

  /// Every k-th block keeps only its input for the backward and runs again there; 0 = none does.
  /// Gradients stay as they are, bit for bit.
  void set_checkpointing(int64_t every);
  int64_t checkpointing() const { return checkpoint_every_; }

  /// Bytes that the forward of `tokens` tokens keeps for the backward while training, with the
  /// adapters and the checkpointing of now; an estimate for adapters other than one low-rank term
  /// per slot. A model that does not say counts as 0.
  virtual int64_t kept_bytes(int64_t tokens) const;
  /// Bytes that come and go in a step of `tokens` tokens, at their highest.
  virtual int64_t passing_bytes(int64_t tokens) const;

  /// Parameters that require grad and are used by logits() alone.
  virtual std::vector<at::Tensor> head_parameters() const = 0;
  /// The whole of logits() when that is one frozen matrix: no bias, no adapter.
  virtual std::optional<quant::Weight> plain_head() const { return {}; }
  /// dtype of activations.
  virtual at::ScalarType dtype() const = 0;
  /// Path of the token table.
  virtual std::string input_embedding() const { return "model.embed_tokens"; }
  /// Whether checkpoints hold the transpose of the projection at a path (GPT-2's Conv1D).
  virtual bool stores_transposed(const std::string& /*path*/) const { return false; }

  /// Token embeddings [tokens, hidden], what the first block reads.
  virtual at::Tensor embed(const TokenBatch& batch);
  /// The blocks in order, the last of them the final norm with the head. They share the model's
  /// modules. Throws Error for a model that does not come in blocks.
  virtual std::vector<Block> blocks();

 protected:
  /// Where virtual tokens attach.
  const InputSlot& input() const { return input_; }

  bool is_checkpointed(size_t block) const {
    return checkpoint_every_ > 0 && static_cast<int64_t>(block) % checkpoint_every_ == 0;
  }

 private:
  ModelConfig config_;
  InputSlot input_{nullptr};
  int64_t checkpoint_every_ = 0;
};

/// The parameters of a module that require grad.
std::vector<at::Tensor> trained_parameters(const torch::nn::Module& module);
/// Trained tensors of adapters in a module that adapters at other places read.
std::vector<at::Tensor> read_elsewhere(const torch::nn::Module& module);
/// Both lists, each tensor once.
std::vector<at::Tensor> together(std::vector<at::Tensor> tensors,
                                 const std::vector<at::Tensor>& more);

}  // namespace budwood::models
