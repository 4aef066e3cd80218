#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <budwood/peft/attention_adapter.h>
#include <budwood/peft/block_adapter.h>
#include <budwood/peft/embedding_adapter.h>
#include <budwood/peft/input_adapter.h>
#include <budwood/peft/linear_adapter.h>
#include <budwood/peft/ops/projections.h>
#include <budwood/peft/row_groups.h>
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

/// How several active adapters of blocks act on one sub-layer: each on what the one before it made
/// of the output, or all on the output itself, their changes added up. What adapters of projections
/// add is a sum either way.
enum class Composition { stack, parallel };
/// "stack" or "parallel"; throws Error for another name.
Composition composition_of(const std::string& name);

/// What all slots share: named adapters, of which some take part in forward.
class Slot : public torch::nn::Module {
 public:
  virtual SlotKind kind() const = 0;
  /// The path below which an adapter's tensors stand in a file, for a slot at `path`.
  virtual std::string file_path(const std::string& path) const { return path; }

  /// Adds an adapter under a name and makes it active. Throws when the name is taken or the adapter
  /// is for another kind of slot.
  void attach(const std::string& name, std::shared_ptr<Adapter> adapter);
  /// Removes an adapter; unmerge first when it is merged.
  void detach(const std::string& name);
  /// The adapter of that name, or null.
  std::shared_ptr<Adapter> adapter(const std::string& name) const;
  /// Names of all attached adapters in order of attachment.
  std::vector<std::string> adapter_names() const;

  /// Chooses which adapters take part in forward; names that are not attached here are ignored.
  /// Throws when one of several cannot be combined with others.
  void set_active(const std::vector<std::string>& names);
  const std::vector<std::string>& active() const { return active_; }
  void set_composition(Composition composition) { composition_ = composition; }
  /// With false, forward is the bare base, bit for bit.
  void set_adapters_enabled(bool enabled) { enabled_ = enabled; }
  /// Which rows use which adapter, instead of the active ones; null = no such thing.
  void set_row_groups(std::shared_ptr<const RowGroups> groups) { row_groups_ = std::move(groups); }
  /// What is merged into the weight; empty for slots without one.
  virtual const std::vector<std::string>& merged() const;

 protected:
  /// The adapters that take part in forward, in order; none while something is merged.
  template <class A>
  std::vector<const A*> running_as() const {
    std::vector<const A*> found;
    if (!enabled_ || !merged().empty()) return found;
    for (const auto& name : active_) found.push_back(static_cast<const A*>(adapter(name).get()));
    return found;
  }

  Composition composition() const { return composition_; }
  bool row_groups() const { return row_groups_ != nullptr; }
  /// Calls `compute` with the adapter (or null) and the rows of each group and puts the results
  /// [n, ...] where their rows were; nothing when no group has an adapter here. `rows` is how many
  /// there are.
  std::optional<at::Tensor> by_groups(
      int64_t rows,
      const std::function<at::Tensor(const Adapter*, const at::Tensor& rows)>& compute) const;

 private:
  struct Entry {
    std::string name;
    std::shared_ptr<Adapter> adapter;
  };
  void require_composable(const std::vector<std::string>& names) const;

  std::vector<Entry> adapters_;
  std::vector<std::string> active_;
  std::shared_ptr<const RowGroups> row_groups_;
  Composition composition_ = Composition::stack;
  bool enabled_ = true;
};

/// A projection y = x Wᵀ + b with adapters. x [..., in] -> y [..., out].
///
/// The weight and the bias are registered as "weight" and "bias" and do not require grad.
class LinearSlotImpl : public Slot {
 public:
  explicit LinearSlotImpl(quant::Weight weight, at::Tensor bias = {});

  SlotKind kind() const override { return SlotKind::linear; }
  at::Tensor forward(const at::Tensor& x);

  const LinearBase& base() const { return base_; }
  const quant::Weight& weight() const { return base_.weight; }
  const at::Tensor& bias() const { return base_.bias; }
  /// Called with the input of every forward, before it; empty = nobody looks.
  void set_observer(std::function<void(const at::Tensor& x)> observer) {
    observer_ = std::move(observer);
  }
  /// x through the base and the terms of adapters that live elsewhere, then those of its own.
  at::Tensor forward_with(const at::Tensor& x, std::vector<LinearTerm> first) const;
  /// Puts another weight of the same shape in the slot; throws while something is merged.
  void replace_weight(quant::Weight weight);
  void replace_bias(at::Tensor bias);
  int64_t in_features() const { return base_.weight.in; }
  int64_t out_features() const { return base_.weight.out; }

  /// The adapters that take part in forward, in order.
  std::vector<const LinearAdapter*> running() const { return running_as<LinearAdapter>(); }
  /// What they do now.
  std::vector<LinearTerm> terms() const;
  /// The whole slot as one projection, when that is what it computes now: a frozen weight and at
  /// most one low-rank term, and nobody looks at its input. A gain of that term is left out: see
  /// forward_together.
  std::optional<ops::Projection> projection(const std::vector<LinearTerm>& terms) const;

  /// What the named adapters do when nothing is dropped out, as it is merged.
  std::vector<LinearTerm> terms_to_merge(const std::vector<std::string>& names) const;
  /// The whole slot as one frozen matrix, when that is what it is now: no bias, no adapter.
  std::optional<quant::Weight> plain_weight() const;

  /// Folds the named adapters into a new dense weight: products and sum in fp64, one rounding to
  /// the weight's dtype (float32 when it is packed). The old weight is kept, so unmerge is exact.
  /// Throws on a non-finite result or when something is already merged; then nothing has changed.
  void merge(const std::vector<std::string>& names);
  void unmerge();
  /// Makes a merge permanent: the old weight is released.
  void forget_base();
  const std::vector<std::string>& merged() const override { return merged_; }

  /// Casts as any module does, but leaves packed parts as they are: only their bias and adapters
  /// follow.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  using torch::nn::Module::to;

 private:
  void set_weight(quant::Weight weight, at::Tensor bias);
  std::optional<at::Tensor> by_groups(const at::Tensor& x) const;
  using Slot::by_groups;

  LinearBase base_;
  std::vector<std::string> merged_;
  std::optional<LinearBase> unmerged_;
  std::function<void(const at::Tensor&)> observer_;
};
TORCH_MODULE(LinearSlot);

/// The results of slots that read the same: in one operator where each is a projection, else one
/// after the other.
std::vector<at::Tensor> forward_together(const ops::Source& source,
                                         const std::vector<LinearSlot>& slots);

/// A token table: ids -> rows of W [vocabulary, dim]. The same weight can serve as a tied head.
class EmbeddingSlotImpl : public Slot {
 public:
  explicit EmbeddingSlotImpl(quant::Weight weight);

  SlotKind kind() const override { return SlotKind::embedding; }
  /// ids int64 [...] -> [..., dim] in the given dtype. Throws for an id outside the table.
  at::Tensor forward(const at::Tensor& ids, at::ScalarType dtype);
  const quant::Weight& weight() const { return weight_; }
  /// Rows of the table with what the adapters make of them.
  at::Tensor adapt(const at::Tensor& ids, at::Tensor rows) const;

  /// As LinearSlot's; a head that is tied to the table keeps the old one.
  void merge(const std::vector<std::string>& names);
  void unmerge();
  void forget_base();
  const std::vector<std::string>& merged() const override { return merged_; }

  /// As LinearSlot's.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  using torch::nn::Module::to;

 private:
  void set_weight(quant::Weight weight);

  quant::Weight weight_;
  std::vector<std::string> merged_;
  std::optional<quant::Weight> unmerged_;
};
TORCH_MODULE(EmbeddingSlot);

/// The embedded input of a model, before the first block.
class InputSlotImpl : public Slot {
 public:
  InputSlotImpl(int64_t vocabulary, int64_t hidden) : vocabulary_(vocabulary), hidden_(hidden) {}

  SlotKind kind() const override { return SlotKind::input; }
  int64_t hidden() const { return hidden_; }
  int64_t vocabulary() const { return vocabulary_; }
  /// How many virtual tokens the active adapters put into each sequence.
  int64_t virtual_tokens() const;
  /// Whether they go among an encoder's embeddings; see InputAdapter. Throws when the adapters
  /// differ in that.
  bool among_embeddings() const;
  /// Their places among the tokens; nothing without virtual tokens.
  std::optional<Inserted> insert(const Sequences& sequences) const;
  /// Embedded rows [rows, hidden] -> the same with virtual token v where rows[i] is -1 - v.
  at::Tensor forward(const at::Tensor& embedded, const std::vector<int64_t>& rows) const;

 private:
  int64_t vocabulary_, hidden_;
};
TORCH_MODULE(InputSlot);

/// The attention of one layer.
class AttentionSlotImpl : public Slot {
 public:
  AttentionSlotImpl(int64_t layer, int64_t heads, int64_t kv_heads, int64_t head_dim,
                    int64_t hidden)
      : layer_(layer), heads_(heads), kv_heads_(kv_heads), head_dim_(head_dim), hidden_(hidden) {}

  SlotKind kind() const override { return SlotKind::attention; }
  /// The attention module's.
  std::string file_path(const std::string& path) const override {
    return path.substr(0, path.rfind('.'));
  }
  int64_t layer() const { return layer_; }
  int64_t heads() const { return heads_; }
  int64_t kv_heads() const { return kv_heads_; }
  int64_t head_dim() const { return head_dim_; }
  int64_t hidden() const { return hidden_; }

  /// Keys and values of the active adapters, one after the other; undefined when there are none.
  KeyValues prefix() const;
  /// The same times the adapters' gates, [sequences, T, kv_heads, head_dim]; see AttentionAdapter.
  KeyValues prefix(const at::Tensor& hidden, const Sequences& sequences) const;
  /// Whether one of them has a gate.
  bool gates_prefix() const;
  /// How far they move the positions of the tokens.
  int64_t position_shift() const;
  /// Adds to the attention's result what the active adapters put beside it.
  at::Tensor beside(at::Tensor attended, const AttentionAdapter::Around& around) const;
  bool has_active() const { return !running_as<AttentionAdapter>().empty(); }

 private:
  int64_t layer_, heads_, kv_heads_, head_dim_, hidden_;
};
TORCH_MODULE(AttentionSlot);

/// rows [tokens, ...] with `prefix` [T, ...] or [sequences, T, ...] before those of each sequence
/// [cu[s], cu[s + 1]).
at::Tensor with_prefix(const at::Tensor& prefix, const at::Tensor& rows,
                       const std::vector<int64_t>& cu);

/// The output of a sub-layer.
class BlockSlotImpl : public Slot {
 public:
  /// `part` is "attention" or "feed_forward".
  BlockSlotImpl(std::string part, int64_t layer, int64_t hidden)
      : part_(std::move(part)), layer_(layer), hidden_(hidden) {}

  SlotKind kind() const override { return SlotKind::block; }
  const std::string& part() const { return part_; }
  int64_t layer() const { return layer_; }
  int64_t hidden() const { return hidden_; }

  /// The residual stream after the sub-layer: norm(h + x) with what the adapters do; an empty norm
  /// leaves the sum as it is. See block_adapter.h.
  at::Tensor forward(at::Tensor h, const at::Tensor& x, const BlockAdapter::Norm& norm,
                     const Sequences& sequences) const;
  /// Its two halves, for a model that adds x itself: h, and the stream after it.
  at::Tensor adapt(at::Tensor h, const at::Tensor& x, const BlockAdapter::Norm& norm,
                   const Sequences& sequences) const;
  at::Tensor edit(at::Tensor stream, const Sequences& sequences) const;

 private:
  std::string part_;
  int64_t layer_, hidden_;
};
TORCH_MODULE(BlockSlot);

}  // namespace budwood
