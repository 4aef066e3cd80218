#pragma once

#include <budwood/peft/adapter.h>
#include <budwood/peft/placement.h>

namespace budwood {

/// What attaches to the embedded input of a model: virtual tokens.
class InputAdapter : public Adapter {
 public:
  using Adapter::Adapter;
  SlotKind kind() const override { return SlotKind::input; }
  bool starts_as_identity() const override { return false; }

  /// Embeddings of the virtual tokens [T, dim], differentiable.
  virtual at::Tensor tokens() const = 0;
  /// Where they go.
  virtual const Placement& placement() const = 0;
  /// Whether they go among an encoder's embeddings, with positions and norm, and not among words.
  virtual bool among_embeddings() const { return false; }
};

}  // namespace budwood
