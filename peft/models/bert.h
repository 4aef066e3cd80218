#pragma once

#include <budwood/peft/described.h>
#include <budwood/peft/models/batch.h>
#include <budwood/peft/models/layer_norm.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/slot.h>
#include <memory>
#include <optional>
#include <string>
#include <vector>

/// BERT and its like as encoders: hidden states, sentence embeddings, classification.
namespace budwood::models {

/// config.json of a BERT folder. Names are transformers'.
struct BertConfig {
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0, num_hidden_layers = 0;
  int64_t num_attention_heads = 0, max_position_embeddings = 0, type_vocab_size = 2;
  double layer_norm_eps = 1e-12;
  std::string hidden_act = "gelu";  ///< gelu, gelu_new or relu
  int64_t num_labels = 0;           ///< of a classifier; 0 = the folder has none
  std::string source_json;          ///< the file this was read from

  /// A missing key or a value that is not supported is an Error that names it.
  static BertConfig from_json(const std::string& text);
};

class BertLayerImpl : public torch::nn::Module {
 public:
  BertLayerImpl(const BertConfig& config, int64_t layer, const std::string& path,
                WeightSource& source);
  at::Tensor forward(const at::Tensor& x, const TokenBatch& batch);
  const AttentionSlot& adapters() const { return adapters_; }

 private:
  at::Tensor attention(const at::Tensor& x, const TokenBatch& batch);

  int64_t heads_, head_dim_;
  std::string activation_;
  LinearSlot query_{nullptr}, key_{nullptr}, value_{nullptr}, attention_dense_{nullptr};
  LinearSlot intermediate_{nullptr}, dense_{nullptr};
  LayerNorm attention_norm_{nullptr}, norm_{nullptr};
  AttentionSlot adapters_{nullptr};
  BlockSlot attention_adapters_{nullptr}, output_adapters_{nullptr};
};
TORCH_MODULE(BertLayer);

/// A BERT encoder over slots. Module paths are transformers' own ("bert.encoder.layer.0..."), below
/// "bert." when the folder has a head and without it when not, so adapter files fit without
/// renaming. Dropout of the base is off: it is frozen.
class Bert : public torch::nn::Module, public Described {
 public:
  /// A classifier the folder does not have is made anew with `num_labels` rows, drawn from `seed`,
  /// when that is above 0.
  Bert(BertConfig config, WeightSource& source, int64_t num_labels = 0, uint64_t seed = 0);

  const BertConfig& config() const { return config_; }
  std::string model_type() const override { return "bert"; }
  std::string output_embedding() const override { return ""; }

  /// Last hidden states [tokens, hidden]; virtual tokens of adapters have rows of their own.
  at::Tensor hidden(const TokenBatch& batch);
  /// Means over each sequence of the last hidden states, of length 1 with `normalize`:
  /// [sequences, hidden]. Virtual tokens do not count.
  at::Tensor sentence_embedding(const TokenBatch& batch, bool normalize = true);
  /// Logits [sequences, labels] from the pooled first token, or the first behind virtual ones.
  /// Throws without a classifier.
  at::Tensor classify(const TokenBatch& batch);
  /// Mean cross-entropy of classify() against labels int64 [sequences].
  at::Tensor loss(const TokenBatch& batch, const at::Tensor& labels);
  bool has_classifier() const { return !classifier_.is_empty(); }

  /// As CausalLM's.
  void set_checkpointing(int64_t every);

 private:
  std::pair<TokenBatch, at::Tensor> run(const TokenBatch& batch);

  BertConfig config_;
  at::ScalarType dtype_;
  int64_t checkpoint_every_ = 0;
  EmbeddingSlot words_{nullptr}, positions_{nullptr}, types_{nullptr};
  LayerNorm norm_{nullptr};
  std::vector<BertLayer> layers_;
  LinearSlot pooler_{nullptr}, classifier_{nullptr};
  InputSlot input_{nullptr};
};

/// A BERT folder. Options as in load(): dtype and quantize.
std::shared_ptr<Bert> load_bert(const std::string& folder, const LoadOptions& options = {},
                                int64_t num_labels = 0, uint64_t seed = 0);

}  // namespace budwood::models
