#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

/// Products with a matrix W [rows, cols] that is stored in some packed form and never held whole:
/// panels of rows, sized for the cache, are decoded and multiplied one after the other. All packed
/// forms go through here.
namespace budwood::quant {

/// A packed matrix, seen as rows that can be decoded. CPU only.
struct PackedRows {
  int64_t rows = 0, cols = 0;
  /// Writes one row as `cols` fp32 values; called from several threads.
  std::function<void(int64_t row, float* dst)> decode;
};

/// x Wᵀ: [..., cols] -> [..., rows] in the dtype of x. Up to 8 tokens are multiplied in fp32 while
/// a row lies in the first cache; more go panel by panel through ATen in the dtype of x.
at::Tensor panel_linear(const PackedRows& w, const at::Tensor& x);

/// dY W: [..., rows] -> [..., cols] in the dtype of dY; sums over panels are fp32 or wider.
at::Tensor panel_backward_input(const PackedRows& w, const at::Tensor& grad);

/// Rows [begin, end) as [end - begin, cols].
at::Tensor panel_rows(const PackedRows& w, int64_t begin, int64_t end, at::ScalarType dtype);

/// Rows chosen by ids (int64, any shape): [..., cols]. Throws Error for an id outside the matrix.
at::Tensor panel_gather(const PackedRows& w, const at::Tensor& ids, at::ScalarType dtype);

}  // namespace budwood::quant
