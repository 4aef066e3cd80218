#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <budwood/peft/adapter.h>
#include <budwood/peft/ops/projections.h>
#include <budwood/quant/weight.h>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

/// Slots: the places of a model where adapters attach. A slot holds what is frozen and an ordered
/// list of named adapters. Adapters never replace modules, so no path in a model ever changes, and
/// a slot never asks what its weight is made of.
namespace budwood {

/// A projection y = x Wᵀ + b with adapters. x [..., in] -> y [..., out].
///
/// The weight and the bias are registered as "weight" and "bias" and do not require grad.
class LinearSlotImpl : public torch::nn::Module {
 public:
  explicit LinearSlotImpl(quant::Weight weight, at::Tensor bias = {});

  at::Tensor forward(const at::Tensor& x);

  const quant::Weight& weight() const { return weight_; }
  const at::Tensor& bias() const { return bias_; }
  /// Called with the input of every forward, before it; empty = nobody looks.
  void set_observer(std::function<void(const at::Tensor& x)> observer) {
    observer_ = std::move(observer);
  }
  /// Puts another weight of the same shape in the slot; throws while something is merged.
  void replace_weight(quant::Weight weight);
  int64_t in_features() const { return weight_.in; }
  int64_t out_features() const { return weight_.out; }

  /// Adds an adapter under a name and makes it active. Throws when the name is taken.
  void attach(const std::string& name, std::shared_ptr<LinearAdapter> adapter);
  /// Removes an adapter; unmerge first when it is merged.
  void detach(const std::string& name);
  /// The adapter of that name, or null.
  std::shared_ptr<LinearAdapter> adapter(const std::string& name) const;
  /// Names of all attached adapters in order of attachment.
  std::vector<std::string> adapter_names() const;

  /// Chooses which adapters take part in forward; names that are not attached here are ignored.
  void set_active(const std::vector<std::string>& names);
  const std::vector<std::string>& active() const { return active_; }
  /// The adapters that take part in forward, in order; none while something is merged.
  std::vector<LinearAdapter*> running() const;
  /// The whole slot as one projection, when that is what it computes now: a frozen weight and at
  /// most one low-rank term, and nobody looks at its input.
  std::optional<ops::Projection> projection() const;
  /// With false, forward is the bare base, bit for bit.
  void set_adapters_enabled(bool enabled) { enabled_ = enabled; }

  /// Folds the named adapters into a new dense weight: products and sum in fp64, one rounding to
  /// the weight's dtype (float32 when it is packed). The old weight is kept, so unmerge is exact.
  /// Throws on a non-finite result or when something is already merged; then nothing has changed.
  void merge(const std::vector<std::string>& names);
  void unmerge();
  /// Makes a merge permanent: the old weight is released.
  void forget_base();
  const std::vector<std::string>& merged() const { return merged_; }

  /// Casts as any module does, but leaves packed parts as they are: only their bias and adapters
  /// follow.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  using torch::nn::Module::to;

 private:
  struct Entry {
    std::string name;
    std::shared_ptr<LinearAdapter> adapter;
  };
  void set_weight(quant::Weight weight, at::Tensor bias);
  at::Tensor with_adapters(const at::Tensor& x, const std::vector<LinearAdapter*>& adapters);

  quant::Weight weight_;
  at::Tensor bias_;
  std::vector<Entry> adapters_;
  std::vector<std::string> active_;
  std::vector<std::string> merged_;
  std::optional<std::pair<quant::Weight, at::Tensor>> unmerged_;
  std::function<void(const at::Tensor&)> observer_;
  bool enabled_ = true;
};
TORCH_MODULE(LinearSlot);

/// The results of slots that read the same: in one operator where each is a projection, else one
/// after the other.
std::vector<at::Tensor> forward_together(const ops::Source& source,
                                         const std::vector<LinearSlot>& slots);

/// A token table: ids -> rows of W [vocabulary, dim]. The same weight can serve as a tied head.
class EmbeddingSlotImpl : public torch::nn::Module {
 public:
  explicit EmbeddingSlotImpl(quant::Weight weight);
  /// ids int64 [...] -> [..., dim] in the given dtype. Throws for an id outside the table.
  at::Tensor forward(const at::Tensor& ids, at::ScalarType dtype);
  const quant::Weight& weight() const { return weight_; }

  /// As LinearSlot's.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  using torch::nn::Module::to;

 private:
  quant::Weight weight_;
};
TORCH_MODULE(EmbeddingSlot);

}  // namespace budwood
