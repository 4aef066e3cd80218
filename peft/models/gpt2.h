#pragma once

#include <budwood/peft/models/layer_norm.h>
#include <budwood/peft/models/model.h>
#include <budwood/peft/models/weight_source.h>

namespace budwood::models {

class Gpt2AttentionImpl : public torch::nn::Module {
 public:
  Gpt2AttentionImpl(const ModelConfig& config, int64_t layer, const std::string& path,
                    WeightSource& source);
  /// x [tokens, hidden] -> [tokens, hidden].
  at::Tensor forward(const ops::Source& x, const TokenBatch& batch, KvCache* cache);
  const AttentionSlot& adapters() const { return adapters_; }

 private:
  int64_t layer_, heads_, head_dim_;
  LinearSlot c_attn_{nullptr}, c_proj_{nullptr};
  AttentionSlot adapters_{nullptr};
};
TORCH_MODULE(Gpt2Attention);

class Gpt2MlpImpl : public torch::nn::Module {
 public:
  Gpt2MlpImpl(const ModelConfig& config, const std::string& path, WeightSource& source);
  at::Tensor forward(const ops::Source& x);

 private:
  std::string activation_;
  LinearSlot c_fc_{nullptr}, c_proj_{nullptr};
};
TORCH_MODULE(Gpt2Mlp);

class Gpt2BlockImpl : public torch::nn::Module {
 public:
  Gpt2BlockImpl(const ModelConfig& config, int64_t layer, const std::string& path,
                WeightSource& source);
  at::Tensor forward(const at::Tensor& x, const TokenBatch& batch, KvCache* cache);
  const AttentionSlot& adapters() const { return attn_->adapters(); }

 private:
  LayerNorm ln_1_{nullptr}, ln_2_{nullptr};
  Gpt2Attention attn_{nullptr};
  Gpt2Mlp mlp_{nullptr};
  BlockSlot attention_adapters_{nullptr}, output_adapters_{nullptr};
};
TORCH_MODULE(Gpt2Block);

/// GPT-2: learned positions, layer norms before the sub-layers, projections that checkpoints hold
/// as their transposes. Dropout of the base is off: it is frozen.
class Gpt2ForCausalLM : public CausalLM {
 public:
  Gpt2ForCausalLM(ModelConfig config, WeightSource& source);

  at::Tensor hidden(const TokenBatch& batch, KvCache* cache = nullptr) override;
  at::Tensor logits(const at::Tensor& hidden) override;
  std::vector<at::Tensor> head_parameters() const override;
  std::optional<quant::Weight> plain_head() const override;
  at::ScalarType dtype() const override { return dtype_; }
  std::string input_embedding() const override { return "transformer.wte"; }
  bool stores_transposed(const std::string& path) const override;

 private:
  at::ScalarType dtype_;
  EmbeddingSlot wte_{nullptr}, wpe_{nullptr};
  std::vector<Gpt2Block> layers_;
  LayerNorm ln_f_{nullptr};
  LinearSlot lm_head_{nullptr};
};

}  // namespace budwood::models
