#include <ATen/ATen.h>
#include <torch/library.h>

#include <budwood/quant/error.h>
#include <budwood/quant/ops.h>
#include <budwood/quant/quantize.h>

namespace budwood::quant {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Pair = std::tuple<at::Tensor, at::Tensor>;

Format format_of(std::string_view quant_type) {
  if (quant_type == "nf4") return Format::nf4;
  if (quant_type == "fp4") return Format::fp4;
  throw Error("quantize_4bit", "quant_type is nf4 or fp4, found " + std::string(quant_type));
}

at::Tensor one_integer(int64_t value, at::Device device) {
  return at::full({1}, value, at::TensorOptions().dtype(at::kLong).device(device));
}

Pair quantize_kernel(const at::Tensor& w, c10::string_view quant_type, int64_t block_size) {
  format_of(quant_type);
  const auto result = quantize(w, {.format = std::string(quant_type), .block_size = block_size});
  return {result.parts[0], result.parts[1]};
}

Pair quantize_meta(const at::Tensor& w, c10::string_view, int64_t block_size) {
  TORCH_CHECK(w.dim() == 2, "[quantize_4bit] a weight is a matrix, found ", w.dim(), " dimensions");
  TORCH_CHECK(block_size > 0, "[quantize_4bit] block size ", block_size);
  const auto out = w.sym_size(0), in = w.sym_size(1), n = out * in;
  std::vector<c10::SymInt> shape;
  if (in % block_size == 0)
    shape = {out, in / 2};
  else
    shape = {(n + 1) / 2};
  return {at::empty_symint(shape, w.options().dtype(at::kByte)),
          at::empty_symint({(n + (block_size - 1)) / block_size}, w.options().dtype(at::kFloat))};
}

at::Tensor dequantize_kernel(const at::Tensor& codes, const at::Tensor& absmax,
                             c10::string_view quant_type, int64_t block_size, at::IntArrayRef shape,
                             at::ScalarType dtype) {
  TORCH_CHECK(shape.size() == 2, "[dequantize_4bit] shape is [out, in], found ", shape);
  return Weight::from_parts({codes, absmax, one_integer(block_size, at::kCPU)},
                            static_cast<int64_t>(format_of(quant_type)), shape[0], shape[1])
      .rows(0, shape[0], dtype);
}

at::Tensor dequantize_meta(const at::Tensor& codes, const at::Tensor&, c10::string_view, int64_t,
                           c10::SymIntArrayRef shape, at::ScalarType dtype) {
  return at::empty_symint(shape, codes.options().dtype(dtype));
}

// Nothing of its own: autograd, autocast and tracing see linear.
at::Tensor linear_4bit(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& absmax,
                       c10::string_view quant_type, int64_t block_size, c10::SymIntArrayRef shape,
                       const OptionalTensor& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("budwood::linear", "")
                             .typed<at::Tensor(const at::Tensor&, at::TensorList, int64_t,
                                               c10::SymIntArrayRef, const OptionalTensor&)>();
  // Tracing wants all parts of a weight on one device.
  const std::array parts{codes, absmax, one_integer(block_size, codes.device())};
  return op.call(x, parts, static_cast<int64_t>(format_of(quant_type)), shape, bias);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(budwood, m) {
  m.def("quantize_4bit(Tensor weight, str quant_type='nf4', int block_size=64) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "dequantize_4bit(Tensor codes, Tensor absmax, str quant_type, int block_size, SymInt[] "
      "shape, "
      "ScalarType dtype=float32) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_4bit(Tensor x, Tensor codes, Tensor absmax, str quant_type, int block_size, "
      "SymInt[] shape, Tensor? bias=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.impl("linear_4bit", linear_4bit);
}

#define BUDWOOD_DEVICE_KERNELS(key)               \
  TORCH_LIBRARY_IMPL(budwood, key, m) {           \
    m.impl("quantize_4bit", quantize_kernel);     \
    m.impl("dequantize_4bit", dequantize_kernel); \
  }
BUDWOOD_DEVICE_KERNELS(CPU)
BUDWOOD_DEVICE_KERNELS(CUDA)
#undef BUDWOOD_DEVICE_KERNELS

TORCH_LIBRARY_IMPL(budwood, Meta, m) {
  m.impl("quantize_4bit", quantize_meta);
  m.impl("dequantize_4bit", dequantize_meta);
}

}  // namespace budwood::quant
