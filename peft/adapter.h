#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace budwood {

struct AdapterConfig;
class LinearSlotImpl;

/// Tensors of an adapter under the names its file uses below the module path, for example
/// {"lora_A.weight", A [r, in]}.
using AdapterState = std::vector<std::pair<std::string, at::Tensor>>;

/// What is trained at one place of a model. Its parameters are fp32 leaves that require grad.
class Adapter : public torch::nn::Module {
 public:
  explicit Adapter(std::shared_ptr<const AdapterConfig> config) : config_(std::move(config)) {}

  /// The configuration this adapter was made from; shared by all places of one injection.
  const std::shared_ptr<const AdapterConfig>& config() const { return config_; }
  /// Tensors to save, in file order. Writing into them changes the adapter.
  virtual AdapterState state() const = 0;
  /// Which biases of the base are trained along: "none", "all", or "lora_only" (the slot's own).
  virtual std::string trained_bias() const { return "none"; }

 private:
  std::shared_ptr<const AdapterConfig> config_;
};

/// A low-rank term s (x Aᵀ) Bᵀ that a slot can compute together with its base weight.
struct LowRank {
  at::Tensor a;  ///< [r, in]
  at::Tensor b;  ///< [out, r]
  double scaling = 1.0;
};

/// What attaches to a Linear slot.
class LinearAdapter : public Adapter {
 public:
  using Adapter::Adapter;

  /// y [..., out] is the slot's result so far for x [..., in]; returns the result with this
  /// adapter.
  virtual at::Tensor forward(const LinearSlotImpl& slot, const at::Tensor& x, at::Tensor y) = 0;
  /// The whole adapter as one low-rank term, when it is nothing else for this call (no dropout).
  virtual std::optional<LowRank> low_rank() const { return {}; }
  /// Rows [begin, begin + rows.size(0)) of the base weight in fp64 -> the same rows with the
  /// adapter folded in. Throws Error for a method that cannot be merged.
  virtual at::Tensor merge_rows(const at::Tensor& rows, int64_t begin) const = 0;
  /// The bias with the adapter folded in; an undefined tensor stands for no bias.
  virtual at::Tensor merge_bias(const at::Tensor& bias) const { return bias; }
};

}  // namespace budwood
