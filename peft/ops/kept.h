#pragma once

#include <ATen/core/Tensor.h>

/// What operators keep of a forward for its backward. As a rule the tensors themselves; optionally
/// activations rounded to 16 bits, which halves them: values stay exact, gradients of a fp32 model
/// get a relative error of about 2^-9 in what they read. What attention keeps stays as it is: its
/// gradients are differences of nearly equal numbers.
namespace budwood::ops {

/// While it lives, operators that this thread calls keep fp32 activations in `type` (bfloat16).
class ScopedKeptType {
 public:
  explicit ScopedKeptType(at::ScalarType type);
  ~ScopedKeptType();
  ScopedKeptType(const ScopedKeptType&) = delete;
  ScopedKeptType& operator=(const ScopedKeptType&) = delete;

 private:
  at::ScalarType before_;
};

/// The dtype in which an activation of that dtype is kept now.
at::ScalarType kept_type(at::ScalarType type);
void set_kept_type(at::ScalarType type);

/// What is kept of an activation; the same tensor for each operator that keeps the same values.
/// Tensors of less than two dimensions, which are parameters, are kept as they are.
at::Tensor keep(const at::Tensor& activation);
/// Says that an activation is kept as it is anyway: keep() then gives it itself.
void keep_exactly(const at::Tensor& activation);
/// What was kept, in the dtype that it had.
at::Tensor restored(const at::Tensor& kept, at::ScalarType type);

}  // namespace budwood::ops
