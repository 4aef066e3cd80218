#pragma once

#include <budwood/peft/attention_adapter.h>
#include <budwood/peft/methods/prompt_config.h>

#include <cstdint>
#include <memory>

namespace budwood {

/// What the layers of a prefix share: a table [T, 2 L kv_heads head_dim], row t holding key and
/// value of layer 0, of layer 1, ..., or what makes it: E [T, e], tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂.
struct PrefixTable {
  int64_t layers = 0, width = 0;  ///< width = kv_heads head_dim
  at::Tensor table;
  at::Tensor embedding, w1, b1, w2, b2;
  bool projected = false;

  KeyValues of(int64_t layer, int64_t kv_heads, int64_t head_dim) const;
  /// The whole table as it is now.
  at::Tensor value() const;
};

/// Prefix tuning (arXiv 2101.00190): T learned keys and values before those of each layer, seen by
/// every query and used as they are. Saved is the table; the MLP is kept beside it so that training
/// can go on.
class Prefix final : public AttentionAdapter {
 public:
  /// `index` counts the layers that have the prefix; the first trains and saves the table.
  Prefix(std::shared_ptr<const PrefixTuningConfig> config, std::shared_ptr<PrefixTable> shared,
         int64_t index, const Place& place, at::Generator generator);

  KeyValues prefix() const override { return shared_->of(index_, kv_heads_, head_dim_); }
  bool gates_prefix() const override { return gate_weight_.defined(); }
  at::Tensor gate(const at::Tensor& hidden, const Sequences& sequences) const override;
  bool moves_positions() const override;
  bool starts_as_identity() const override { return false; }
  AdapterState state() const override;
  AdapterState shared_state() const override;
  void loaded(const std::vector<std::string>& found) override;
  void describe(AdapterConfig& saved, const std::string& path) const override;
  std::vector<at::Tensor> trained() const override;
  std::vector<at::Tensor> read_elsewhere() const override { return shared_trained(); }
  int64_t rank() const override { return shared_->table.size(0); }

 private:
  const PrefixTuningConfig& own() const;
  std::vector<at::Tensor> shared_trained() const;

  std::shared_ptr<PrefixTable> shared_;
  int64_t index_, kv_heads_, head_dim_;
  at::Tensor gate_weight_, gate_bias_;  ///< [1 or 2, hidden] and [1 or 2]
};

}  // namespace budwood
