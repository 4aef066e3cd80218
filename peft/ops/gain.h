#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/weight.h>
#include <functional>

/// The gradient of a gain g [out] in y = g ∘ z, z = x Wᵀ + s (x Aᵀ) Bᵀ, from what the forward made:
/// z is not kept, where g is not 0 it is y / g.
namespace budwood::ops {

/// What z was made of, for those entries whose gain is 0. x() is [tokens, in], u = x Aᵀ
/// [tokens, r]; u and B may be undefined.
struct GainedProduct {
  const quant::Weight& weight;
  std::function<at::Tensor()> x;
  at::Tensor u, b;
  double scaling = 1.0;
};

/// Sum over tokens of dy ∘ z [out], in the dtype of g. dy and y [tokens, out].
at::Tensor gain_gradient(const at::Tensor& dy, const at::Tensor& y, const at::Tensor& gain,
                         const GainedProduct& made_of);

}  // namespace budwood::ops
