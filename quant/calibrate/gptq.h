#pragma once

#include <budwood/quant/weight.h>
#include <string>

namespace budwood::quant::calibrate {

struct GptqOptions {
  /// "affine": unsigned integers of `bits` with a scale and a zero point; "nf4", "fp4":
  /// bitsandbytes' 4 bits, whose groups are its blocks (packed_matrix.h).
  std::string format = "affine";
  int64_t bits = 4;         ///< 4 or 8
  int64_t group_size = 64;  ///< columns that share a scale; -1 = a whole row
  /// Quantises the columns with the largest inputs first. Unless static_groups is set, a group is
  /// then no run of neighbours and the weight carries the order of its columns; nf4 and fp4 have no
  /// place for it.
  bool act_order = false;
  /// Takes the scales of the groups, runs of neighbours, from the weight before any update.
  bool static_groups = false;
  /// Added to the Hessian's diagonal, as a part of the diagonal's mean.
  double damping = 0.01;
  bool symmetric = false;  ///< affine only
  /// nf4 and fp4 only: scales are themselves quantised to 8 bits, which asks for static_groups.
  bool double_quant = false;
  /// Columns that are updated one by one before the rest is updated at once. Speed only.
  int64_t block = 128;
};

/// GPTQ (arXiv 2210.17323): rounds W [out, in] column by column and lets the columns to come take
/// up each column's error, as the inputs' `hessian` [in, in] (HessianSum::mean, any factor) says.
/// Arithmetic is fp64. A column whose inputs were all 0 becomes 0. Throws Error for values that are
/// not finite and for a Hessian that is not positive definite with this damping.
Weight gptq(const at::Tensor& w, const at::Tensor& hessian, const GptqOptions& options = {});

}  // namespace budwood::quant::calibrate
