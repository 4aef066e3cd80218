#pragma once

#include <budwood/peft/adapter.h>

namespace budwood {

/// What attaches to a token table.
class EmbeddingAdapter : public Adapter {
 public:
  using Adapter::Adapter;
  SlotKind kind() const override { return SlotKind::embedding; }

  /// rows [..., dim] are the table's for ids int64 [...], with the adapters before; returns them
  /// with this adapter.
  virtual at::Tensor forward(const at::Tensor& ids, at::Tensor rows) const = 0;
  /// Rows [begin, begin + rows.size(0)) of the table in fp64 -> the same with the adapter folded
  /// in.
  virtual at::Tensor fold_rows(at::Tensor rows, int64_t begin) const = 0;
};

}  // namespace budwood
