#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/kernels/quantize_status.h>

namespace budwood::quant {

/// Scales of 4-bit blocks that are themselves quantised to 8 bits ("double quantisation"), as
/// bitsandbytes stores them; kernels/bnb4.h has the arithmetic.
struct NestedScales {
  at::Tensor codes;                ///< uint8 [blocks]
  at::Tensor absmax;               ///< fp32 [ceil(blocks / 256)]
  at::Tensor map;                  ///< fp32 [256]
  at::Tensor offset;               ///< fp32 [1], the scales' mean
  kernels::QuantizeStatus status;  ///< not ok: the scale at status.index does not fit
};

/// scales [blocks], fp32 on the CPU.
NestedScales nest_scales(const at::Tensor& scales);

}  // namespace budwood::quant
