#include <ATen/ATen.h>

#include <budwood/quant/kernels/bnb4.h>
#include <budwood/quant/nested_scales.h>
#include <algorithm>

namespace budwood::quant {

NestedScales nest_scales(const at::Tensor& scales) {
  const int64_t blocks = scales.numel();
  const auto floats = scales.options();
  NestedScales nested{at::empty({blocks}, floats.dtype(at::kByte)),
                      at::empty({(blocks + 255) / 256}, floats),
                      at::empty({256}, floats),
                      scales.mean().reshape({1}),
                      {}};
  nested.status = kernels::quantize_absmax(
      scales.const_data_ptr<float>(), blocks, nested.offset.item<float>(),
      nested.codes.mutable_data_ptr<uint8_t>(), nested.absmax.mutable_data_ptr<float>());
  std::copy_n(kernels::dynamic_map(), 256, nested.map.mutable_data_ptr<float>());
  return nested;
}

}  // namespace budwood::quant
