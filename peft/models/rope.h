#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/peft/models/config.h>
#include <optional>

namespace budwood::models {

/// Angle tables of rotary position embedding, computed as transformers does (fp32).
class RotaryTable {
 public:
  RotaryTable(const RopeConfig& rope, int64_t head_dim);

  struct Angles {
    at::Tensor cos, sin;  ///< [tokens, head_dim / 2], fp32, attention factor included
  };
  /// positions int64 [tokens].
  Angles at(const at::Tensor& positions) const;

  const at::Tensor& inverse_frequencies() const { return inverse_frequencies_; }
  /// What YaRN multiplies cos and sin by; 1 otherwise.
  double attention_factor() const { return attention_factor_; }

 private:
  at::Tensor inverse_frequencies_;  // [head_dim / 2]
  double attention_factor_ = 1.0;
};

/// The same rotation as Llama 3's type, which Hugging Face knows, when divisors of frequencies are
/// such a blend; nothing otherwise.
std::optional<RopeConfig> llama3_of(const RopeConfig& rope, int64_t head_dim);

}  // namespace budwood::models
