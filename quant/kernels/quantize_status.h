#pragma once

#include <cstdint>

namespace budwood::quant::kernels {

enum class Fault {
  none = 0,
  not_finite,    ///< the element is NaN or infinite
  out_of_range,  ///< the element is finite, but its scale (or itself) overflows the stored type
};

/// What a quantiser met. After a fault the output is not to be used; the caller, who knows the
/// tensor's name, makes the error of it.
struct QuantizeStatus {
  Fault fault = Fault::none;
  int64_t index = -1;  ///< element at fault, counted from the start of the input

  bool ok() const { return fault == Fault::none; }
};

}  // namespace budwood::quant::kernels
