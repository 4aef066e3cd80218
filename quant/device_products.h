#pragma once

#include <budwood/quant/weight.h>

#include <memory>
#include <optional>

/// Products with packed weights on a device other than the CPU. The steps that a device's kernels
/// do are virtual; all else is here and the same for every device.
namespace budwood::quant {

class DeviceProducts {
 public:
  virtual ~DeviceProducts() = default;

  /// x Wᵀ: a few tokens row by row, more through decoded panels of bounded size and ATen.
  at::Tensor linear(const Weight& w, const at::Tensor& x) const;
  at::Tensor backward_input(const Weight& w, const at::Tensor& grad) const;
  at::Tensor rows(const Weight& w, int64_t begin, int64_t end, at::ScalarType dtype) const;
  /// An id outside the table stops the device.
  at::Tensor gather(const Weight& w, const at::Tensor& ids, at::ScalarType dtype) const;

  /// w, contiguous fp32, bf16 or fp16, to the codes and scales of nf4 or fp4, with the CPU's bytes.
  /// Returns the first element that is not finite, if there is one.
  virtual std::optional<int64_t> encode_4bit(const at::Tensor& w, Format format, int64_t block_size,
                                             at::Tensor& codes, at::Tensor& absmax) const = 0;

 protected:
  /// Rows ids[i] (int64 [count]), or begin + i where ids is undefined, to target [count, in], which
  /// is contiguous fp32, bf16 or fp16.
  virtual void decode(const Weight& w, int64_t begin, const at::Tensor& ids,
                      at::Tensor& target) const = 0;
  /// y [tokens, out] = x [tokens, in] Wᵀ; both contiguous, of one of these types.
  virtual void multiply_few(const Weight& w, const at::Tensor& x, at::Tensor& y) const = 0;

 private:
  template <class Use>
  void for_panels(const Weight& w, at::ScalarType type, const Use& use) const;
};

/// Adds the products of a kind of device; called from a static object.
bool register_device_products(c10::DeviceType type, std::unique_ptr<DeviceProducts> products);

/// Those of a device, or null: the CPU has its own, and for other devices nothing was built.
const DeviceProducts* device_products(c10::Device device);

/// Names of the kinds of devices that packed weights work on, "cpu" first.
std::vector<std::string> packed_devices();

}  // namespace budwood::quant
