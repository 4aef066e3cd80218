#pragma once

#include <budwood/quant/device_products.h>
#include <budwood/quant/panels.h>
#include <budwood/quant/weight.h>
#include <memory>
#include <string>

namespace budwood::quant {

/// A form whose parts are codes: says how they are decoded, and has everything else from panels.h,
/// or from device_products.h where the parts lie on another device. Its values are fp32; it is
/// frozen.
class PackedForm : public WeightForm {
 public:
  at::Tensor linear(const Weight& w, const at::Tensor& x) const override {
    return linear_plus(w, x, {});
  }
  at::Tensor backward_input(const Weight& w, const at::Tensor& grad) const override {
    return backward_input_plus(w, grad, {});
  }
  at::Tensor linear_plus(const Weight& w, const at::Tensor& x, const Terms& terms) const override {
    const auto* device = elsewhere(w);
    return device ? plus(times_gain(device->linear(w, x), terms), terms)
                  : panel_linear(*open(w), x, terms);
  }
  at::Tensor backward_input_plus(const Weight& w, const at::Tensor& grad,
                                 const Terms& terms) const override {
    const auto* device = elsewhere(w);
    return device ? plus(device->backward_input(w, times_gain(grad, terms)), terms)
                  : panel_backward_input(*open(w), grad, terms);
  }
  at::Tensor rows(const Weight& w, int64_t begin, int64_t end,
                  at::ScalarType dtype) const override {
    const auto* device = elsewhere(w);
    return device ? device->rows(w, begin, end, dtype) : panel_rows(*open(w), begin, end, dtype);
  }
  at::Tensor gather(const Weight& w, const at::Tensor& ids, at::ScalarType dtype) const override {
    const auto* device = elsewhere(w);
    return device ? device->gather(w, ids, dtype) : panel_gather(*open(w), ids, dtype);
  }
  at::ScalarType dtype(const Weight&) const override { return at::kFloat; }
  bool packed() const override { return true; }

 protected:
  /// Valid while the weight's parts live; on the CPU.
  virtual std::unique_ptr<kernels::Matrix> open(const Weight& w) const = 0;

  /// Throws unless there are between `least` and `most` parts and the shape is positive.
  void check_parts(const Weight& w, size_t least, size_t most) const;
  /// Throws unless part i lies with the codes on a device that has products for packed weights, is
  /// contiguous, of the dtype and of `count` elements.
  void check_part(const Weight& w, size_t i, const char* what, at::ScalarType type,
                  int64_t count) const;
  /// The positive integer that part i, int64 [1], holds; 0 when it is not on the CPU, where reading
  /// it would stall every product: the device's kernels check it.
  int64_t size_in_part(const Weight& w, size_t i, const char* what) const;

 private:
  /// Null on the CPU.
  const DeviceProducts* elsewhere(const Weight& w) const {
    return device_products(w.parts[0].device());
  }
};

}  // namespace budwood::quant
