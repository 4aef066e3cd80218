#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/peft/kernels/rows.h>
#include <budwood/quant/weight.h>
#include <memory>
#include <optional>
#include <string>
#include <vector>

/// Several projections of one input in one operator: what is computed from tensors that are kept
/// anyway is not kept itself, and the gradient of the input is one sum.
namespace budwood::ops {

/// What projections read: a function of tensors, which are kept for the backward, while its value
/// is computed again.
class Reading {
 public:
  virtual ~Reading() = default;
  /// The value [..., in] of the inputs; differentiable.
  virtual at::Tensor value(const std::vector<at::Tensor>& inputs) const = 0;
  /// Gradients of the inputs from that of the value; undefined where needed[i] is false.
  virtual std::vector<at::Tensor> backward(const std::vector<at::Tensor>& inputs,
                                           const at::Tensor& grad,
                                           const std::vector<bool>& needed) const = 0;
};

/// A reading with its inputs.
struct Source {
  std::shared_ptr<const Reading> reading;
  std::vector<at::Tensor> inputs;

  at::Tensor value() const { return reading->value(inputs); }

  static Source plain(at::Tensor x);
  static Source rms_norm(at::Tensor x, at::Tensor weight, double eps);
  static Source layer_norm(at::Tensor x, at::Tensor weight, at::Tensor bias, double eps);
  static Source gated(kernels::Gate kind, at::Tensor gate, at::Tensor up);
  /// gelu(x); approximate is "none" or "tanh".
  static Source gelu(at::Tensor x, std::string approximate);
};

/// y = gain ∘ (x Wᵀ + scaling (x Aᵀ) Bᵀ) + bias; undefined A and B stand for no low-rank term, an
/// undefined gain for 1.
struct Projection {
  quant::Weight weight;  ///< frozen
  at::Tensor bias = {};  ///< undefined = none
  at::Tensor a = {}, b = {};
  double scaling = 1.0;
  at::Tensor gain = {};  ///< [out]
};

/// The results of all projections, [..., out] each, in the dtype of the source's value.
/// Differentiable in the source's inputs, biases, factors and gains. Kept are the source's inputs
/// and x Aᵀ, and where a gain is trained its result without the bias; nothing else of a token's
/// width.
std::vector<at::Tensor> project(const Source& source, const std::vector<Projection>& projections);

}  // namespace budwood::ops
