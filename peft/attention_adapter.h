#pragma once

#include <budwood/peft/adapter.h>
#include <budwood/peft/sequences.h>

#include <functional>

namespace budwood {

/// Keys and values [T, kv_heads, head_dim], or [sequences, T, kv_heads, head_dim] where they differ
/// by sequence; undefined = none.
struct KeyValues {
  at::Tensor k = {}, v = {};
};

/// What attaches to the attention of one layer.
class AttentionAdapter : public Adapter {
 public:
  using Adapter::Adapter;
  SlotKind kind() const override { return SlotKind::attention; }

  /// Keys and values that every query of every sequence sees beside those of the tokens. They are
  /// used as they are: not rotated, not normalised.
  virtual KeyValues prefix() const { return {}; }
  /// Whether gate() has something to say.
  virtual bool gates_prefix() const { return false; }
  /// Factors [sequences, 2] of these keys and of these values, from the hidden states [tokens,
  /// hidden] or [batch, t, hidden] that the attention reads.
  virtual at::Tensor gate(const at::Tensor& /*hidden*/, const Sequences& /*sequences*/) const {
    return {};
  }
  /// Whether the tokens' positions start after them.
  virtual bool moves_positions() const { return true; }

  /// What the model does around its attention, for beside().
  struct Around {
    at::Tensor q = {};  ///< [tokens, heads, head_dim], rotated
    double scale = 1.0;
    /// Hidden states [n, hidden] -> keys and values by the layer's own projections, not rotated.
    std::function<KeyValues(const at::Tensor&)> project = {};
  };
  /// What is added to the attention's result [tokens, heads, head_dim]; undefined = nothing.
  virtual at::Tensor beside(const Around& /*around*/) const { return {}; }
};

}  // namespace budwood
