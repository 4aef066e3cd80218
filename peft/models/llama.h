#pragma once

#include <budwood/peft/models/model.h>
#include <budwood/peft/models/rope.h>
#include <budwood/peft/models/weight_source.h>
#include <budwood/peft/slot.h>

#include <functional>

/// Decoders of the Llama family from one class: Llama, SmolLM2, Mistral (sliding window), Qwen2
/// (q/k/v bias), Qwen3 (q/k norm). Differences are read from ModelConfig, not from the name.
namespace budwood::models {

class RmsNormImpl : public torch::nn::Module {
 public:
  RmsNormImpl(at::Tensor weight, double eps);
  at::Tensor forward(const at::Tensor& x);
  /// The norm of x as what projections read: x is kept, the norm computed again.
  ops::Source of(const at::Tensor& x) const;
  at::Tensor weight;

 private:
  double eps_;
};
TORCH_MODULE(RmsNorm);

class LlamaAttentionImpl : public torch::nn::Module {
 public:
  LlamaAttentionImpl(const ModelConfig& config, int64_t layer, const std::string& path,
                     WeightSource& source);
  /// x [tokens, hidden] -> [tokens, hidden].
  at::Tensor forward(const ops::Source& x, const TokenBatch& batch,
                     const RotaryTable::Angles& angles, KvCache* cache);
  /// Keys that adapters put before those of each sequence.
  const AttentionSlot& adapters() const { return adapters_; }
  /// Those who read x, and the output projection.
  std::vector<InputGroup> input_groups(const std::string& path, const RotaryTable& rotary,
                                       const RmsNorm& before);
  int64_t kept_per_token(at::ScalarType type) const;

 private:
  int64_t layer_, heads_, kv_heads_, head_dim_, window_;
  LinearSlot q_proj_{nullptr}, k_proj_{nullptr}, v_proj_{nullptr}, o_proj_{nullptr};
  AttentionSlot adapters_{nullptr};
  RmsNorm q_norm_{nullptr}, k_norm_{nullptr};
};
TORCH_MODULE(LlamaAttention);

class LlamaMlpImpl : public torch::nn::Module {
 public:
  LlamaMlpImpl(const ModelConfig& config, const std::string& path, WeightSource& source);
  at::Tensor forward(const ops::Source& x);
  std::vector<InputGroup> input_groups(const std::string& path, const RmsNorm& before);
  int64_t kept_per_token(at::ScalarType type) const;

 private:
  LinearSlot gate_proj_{nullptr}, up_proj_{nullptr}, down_proj_{nullptr};
};
TORCH_MODULE(LlamaMlp);

class LlamaBlockImpl : public torch::nn::Module {
 public:
  LlamaBlockImpl(const ModelConfig& config, int64_t layer, const std::string& path,
                 WeightSource& source);
  at::Tensor forward(const at::Tensor& x, const TokenBatch& batch,
                     const RotaryTable::Angles& angles, KvCache* cache);
  std::vector<InputGroup> input_groups(const std::string& path, const RotaryTable& rotary);
  /// Bytes a token keeps for the backward.
  int64_t kept_per_token(at::ScalarType type) const;
  const AttentionSlot& adapters() const { return self_attn_->adapters(); }

 private:
  RmsNorm input_layernorm_{nullptr}, post_attention_layernorm_{nullptr};
  BlockSlot attention_adapters_{nullptr}, output_adapters_{nullptr};
  LlamaAttention self_attn_{nullptr};
  LlamaMlp mlp_{nullptr};
};
TORCH_MODULE(LlamaBlock);

class LlamaForCausalLM : public CausalLM {
 public:
  LlamaForCausalLM(ModelConfig config, WeightSource& source);

  at::Tensor hidden(const TokenBatch& batch, KvCache* cache = nullptr) override;
  at::Tensor logits(const at::Tensor& hidden) override;
  std::vector<at::Tensor> head_parameters() const override;
  std::optional<quant::Weight> plain_head() const override;
  int64_t kept_bytes(int64_t tokens) const override;
  int64_t passing_bytes(int64_t tokens) const override;
  at::ScalarType dtype() const override { return dtype_; }
  at::Tensor embed(const TokenBatch& batch) override;
  std::vector<Block> blocks() override;

 private:
  at::ScalarType dtype_;
  RotaryTable rotary_;
  EmbeddingSlot embed_tokens_{nullptr};
  std::vector<LlamaBlock> layers_;
  RmsNorm norm_{nullptr};
  LinearSlot lm_head_{nullptr};
};

}  // namespace budwood::models
