#pragma once

#include <budwood/peft/input_adapter.h>
#include <budwood/peft/methods/prompt_config.h>

#include <cstdint>
#include <vector>

namespace budwood {

/// Virtual tokens P [T, dim] in the embedded input: prompt tuning (arXiv 2104.08691), where P is
/// trained itself, and P-tuning (arXiv 2103.10385), where an encoder makes it from E [T, dim].
/// Saved is P; the encoder is kept beside it so that training can go on.
class VirtualTokens : public InputAdapter {
 public:
  using InputAdapter::InputAdapter;

  const Placement& placement() const override { return placement_; }
  at::Tensor tokens() const override;
  AdapterState state() const override { return {}; }
  AdapterState shared_state() const override;
  void loaded(const std::vector<std::string>& found) override;
  void describe(AdapterConfig& saved, const std::string& path) const override;
  std::vector<at::Tensor> trained() const override;
  int64_t rank() const override { return table_.size(0); }

 protected:
  void start(at::Tensor table, Placement placement);
  /// P from the encoder; undefined = P is trained itself.
  virtual at::Tensor encode(bool /*training*/) const { return {}; }
  /// The encoder's tensors by the names they have in a file.
  virtual AdapterState encoder() const { return {}; }

 private:
  Placement placement_;
  at::Tensor table_;     // P, or what the encoder made of it when it was last asked
  bool encoded_ = true;  // while there is an encoder
};

class PromptTuning final : public VirtualTokens {
 public:
  /// `table` is the model's token table, for starts that are made of real tokens.
  PromptTuning(std::shared_ptr<const PromptTuningConfig> config, int64_t hidden,
               const quant::Weight* table, uint64_t seed);
  bool among_embeddings() const override;
};

/// An MLP Linear-ReLU-Linear-ReLU-Linear, or a bidirectional LSTM with Linear-ReLU-Linear.
class PromptEncoder final : public VirtualTokens {
 public:
  PromptEncoder(std::shared_ptr<const PromptEncoderConfig> config, int64_t hidden, uint64_t seed);
  void describe(AdapterConfig& saved, const std::string& path) const override;

 protected:
  at::Tensor encode(bool training) const override;
  AdapterState encoder() const override { return encoder_; }

 private:
  const PromptEncoderConfig& own() const;
  at::Tensor linear(size_t first, const at::Tensor& x) const;

  int64_t width_;
  AdapterState encoder_;
  std::vector<at::Tensor> lstm_;
  size_t head_ = 0;  // where the linear layers begin in encoder_
};

}  // namespace budwood
