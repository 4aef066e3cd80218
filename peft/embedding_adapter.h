#pragma once

#include <budwood/peft/adapter.h>
#include <budwood/quant/weight.h>

namespace budwood {

/// What attaches to a token table.
class EmbeddingAdapter : public Adapter {
 public:
  using Adapter::Adapter;
  SlotKind kind() const override { return SlotKind::embedding; }

  /// rows [..., dim] are those of `table` [vocabulary, dim] for ids int64 [...], with the adapters
  /// before; returns them with this adapter at weight 1.
  virtual at::Tensor forward(const quant::Weight& table, const at::Tensor& ids,
                             at::Tensor rows) const = 0;
  /// Rows [begin, begin + rows.size(0)) of `table` in fp64, on the CPU -> the same with the adapter
  /// at weight 1 folded in.
  virtual at::Tensor fold_rows(const quant::Weight& table, at::Tensor rows,
                               int64_t begin) const = 0;
};

}  // namespace budwood
