#pragma once

#include <budwood/quant/panels.h>
#include <budwood/quant/weight.h>
#include <memory>
#include <string>

namespace budwood::quant {

/// A form whose parts are codes: says how they are decoded, and has everything else from panels.h.
/// Its values are fp32; it is frozen.
class PackedForm : public WeightForm {
 public:
  at::Tensor linear(const Weight& w, const at::Tensor& x) const override {
    return linear_plus(w, x, {});
  }
  at::Tensor backward_input(const Weight& w, const at::Tensor& grad) const override {
    return backward_input_plus(w, grad, {});
  }
  at::Tensor linear_plus(const Weight& w, const at::Tensor& x, const Terms& terms) const override {
    return panel_linear(*open(w), x, terms);
  }
  at::Tensor backward_input_plus(const Weight& w, const at::Tensor& grad,
                                 const Terms& terms) const override {
    return panel_backward_input(*open(w), grad, terms);
  }
  at::Tensor rows(const Weight& w, int64_t begin, int64_t end,
                  at::ScalarType dtype) const override {
    return panel_rows(*open(w), begin, end, dtype);
  }
  at::Tensor gather(const Weight& w, const at::Tensor& ids, at::ScalarType dtype) const override {
    return panel_gather(*open(w), ids, dtype);
  }
  at::ScalarType dtype(const Weight&) const override { return at::kFloat; }
  bool packed() const override { return true; }

 protected:
  /// Valid while the weight's parts live.
  virtual std::unique_ptr<kernels::Matrix> open(const Weight& w) const = 0;

  /// Throws unless there are between `least` and `most` parts and the shape is positive.
  void check_parts(const Weight& w, size_t least, size_t most) const;
  /// Throws unless part i is on the CPU, contiguous, of the dtype and of `count` elements.
  void check_part(const Weight& w, size_t i, const char* what, at::ScalarType type,
                  int64_t count) const;
  /// The positive integer that part i, int64 [1], holds.
  int64_t size_in_part(const Weight& w, size_t i, const char* what) const;
};

}  // namespace budwood::quant
