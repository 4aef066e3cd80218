#pragma once

#include <budwood/peft/adapter.h>

#include <budwood/quant/weight.h>
#include <memory>
#include <optional>
#include <string>
#include <vector>

/// Adapters of projections. Every method for a projection is one formula, LinearTerm; how it is
/// computed, grouped with others and folded into the weight is written once, here.
namespace budwood {

/// The frozen projection an adapter sits on: y = x Wᵀ + b.
struct LinearBase {
  quant::Weight weight = {};
  at::Tensor bias = {};  ///< undefined = none
};

/// What an adapter does to a projection, y being the result so far, b included:
///
///   y' = gain ∘ (y + s (D(x) Aᵀ) Bᵀ + s b_B)                       [gain_spares_bias = false]
///   y' = gain ∘ (y - b + s (D(x) Aᵀ) Bᵀ) + b                       [gain_spares_bias = true]
///
/// and the base reads input_gain ∘ x instead of x. With own_weight the base is x own_weightᵀ +
/// own_bias, with scales it is the codes of the base under other scales. Undefined tensors stand
/// for nothing to do. All tensors may be results of differentiable arithmetic on the adapter's
/// parameters.
struct LinearTerm {
  at::Tensor a = {};  ///< A [r, in]
  at::Tensor b = {};  ///< B [out, r]
  double scaling = 1.0;
  double dropout = 0.0;        ///< probability of D, inverted dropout while training
  at::Tensor inner_bias = {};  ///< b_B [out], scaled as B is
  at::Tensor gain = {};        ///< [out]
  bool gain_spares_bias = false;
  at::Tensor magnitude = {};   ///< [out]: gain is this over norms, which folding takes in fp64
  at::Tensor input_gain = {};  ///< [in]
  at::Tensor own_weight = {}, own_bias = {};  ///< [out, in], [out]
  /// [out, groups]: what the scales and, when defined, the zero points of a group-affine base are
  /// instead; `rescaled` is the base with them.
  at::Tensor scales = {}, zeros = {};
  std::optional<quant::Weight> rescaled = {};
};

/// What attaches to a Linear slot.
class LinearAdapter : public Adapter {
 public:
  using Adapter::Adapter;
  SlotKind kind() const override { return SlotKind::linear; }

  /// The formula with the parameters of now. In evaluation mode it draws nothing.
  virtual LinearTerm term(const LinearBase& base) const = 0;
};

/// x [..., in] -> [..., out]: the base with the terms, one after the other.
at::Tensor apply_terms(const LinearBase& base, const std::vector<LinearTerm>& terms,
                       const at::Tensor& x);
/// Rows [begin, begin + rows.size(0)) of W in fp64, contiguous -> the same rows with the terms
/// folded in, maybe in place.
at::Tensor fold_rows(at::Tensor rows, int64_t begin, const std::vector<LinearTerm>& terms);
/// The bias with the terms folded in, in the bias's dtype (fp32 where there was none); undefined
/// when there is still none.
at::Tensor fold_bias(const at::Tensor& bias, const std::vector<LinearTerm>& terms);

}  // namespace budwood
