#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/weight.h>
#include <cstdint>
#include <optional>
#include <string>

/// Factors of LoRA that begin with what quantising took away from a matrix, instead of 0.
namespace budwood {

struct ResidualOptions {
  /// "loftq" (arXiv 2310.08659): s B A is the best approximation of W - Q. With more than one
  /// iteration Q is then quantised anew from W - s B A, in turns, and the best of all is kept.
  /// "qpissa" (arXiv 2404.02948): s B A is the best approximation of W, and Q the rest, quantised.
  /// "eora" (arXiv 2410.21271): as loftq, where the error is that of the output on given inputs.
  std::string method = "loftq";
  int64_t iterations = 1;  ///< loftq

  /// Throws Error with field, value and what is wanted.
  void validate() const;
  /// Whether Q may become another one.
  bool changes_base() const { return method == "qpissa" || iterations > 1; }
};

struct ResidualStart {
  at::Tensor a, b;  ///< fp32 [r, in] and [out, r]
  /// Q, where it is another one than before, in the same form.
  std::optional<quant::Weight> base;
  /// |W - Q| / |W| before and |W - (Q + s B A)| / |W| after; of "eora" norms are those of the
  /// outputs, |(W - Q) Xᵀ| / |W Xᵀ|.
  double before = 0, after = 0;
  int64_t iteration = 1;  ///< which one was kept
};

/// w [out, in] is the matrix that `q` was quantised from; rank r, s = `scaling`. `covariance`
/// [in, in] is the mean of x xᵀ over the inputs, for "eora". In fp64; exact up to 1024 rows or
/// columns, by subspace iteration above. Throws Error for shapes that do not fit, a rank that is
/// larger than the matrix, a `q` that is no packed weight, or one that cannot be quantised anew
/// when that is asked for.
ResidualStart residual_start(const at::Tensor& w, const quant::Weight& q, int64_t rank,
                             double scaling, const ResidualOptions& options,
                             const at::Tensor& covariance = {});

}  // namespace budwood
