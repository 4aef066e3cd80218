#pragma once

#include <budwood/peft/adapter.h>
#include <budwood/peft/sequences.h>

#include <functional>

namespace budwood {

/// What attaches to the output of a sub-layer (attention or feed-forward part).
///
/// h [tokens, hidden] is what the sub-layer computes and x what the residual stream was before it.
/// A block goes on with norm(h + x) when its norms come after (BERT), with h + x when they come
/// before (Llama, GPT-2); there norm is empty.
class BlockAdapter : public Adapter {
 public:
  using Adapter::Adapter;
  SlotKind kind() const override { return SlotKind::block; }

  using Norm = std::function<at::Tensor(const at::Tensor&)>;
  /// The new h.
  virtual at::Tensor forward(at::Tensor h, const at::Tensor& /*x*/, const Norm& /*norm*/,
                             const Sequences& /*sequences*/) const {
    return h;
  }
  /// The new residual stream after the sub-layer.
  virtual at::Tensor edit(at::Tensor stream, const Sequences& /*sequences*/) const {
    return stream;
  }
};

}  // namespace budwood
