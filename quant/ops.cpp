#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <budwood/quant/ops.h>

namespace budwood::quant {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Weight weight_of(at::TensorList parts, int64_t format, at::IntArrayRef shape) {
  TORCH_CHECK(shape.size() == 2, "[linear] shape is [out, in], found ", shape);
  return Weight::from_parts(parts.vec(), format, shape[0], shape[1]);
}

void check_width(const char* where, const at::Tensor& x, int64_t width) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == width, "[", where, "] the last dimension is ", width,
              ", found a tensor of ", x.sizes());
}

at::Tensor linear_kernel(const at::Tensor& x, at::TensorList parts, int64_t format,
                         at::IntArrayRef shape, const OptionalTensor& bias) {
  const auto w = weight_of(parts, format, shape);
  check_width("linear", x, w.in);
  return w.linear(x, {.bias = bias});
}

at::Tensor backward_input_kernel(const at::Tensor& grad, at::TensorList parts, int64_t format,
                                 at::IntArrayRef shape) {
  const auto w = weight_of(parts, format, shape);
  check_width("linear_backward_input", grad, w.out);
  return w.backward_input(grad);
}

at::Tensor backward_weight_kernel(const at::Tensor& grad, const at::Tensor& x, at::TensorList parts,
                                  int64_t format, at::IntArrayRef shape) {
  return weight_of(parts, format, shape).backward_weight(grad, x);
}

at::Tensor with_last_size(const at::Tensor& like, const c10::SymInt& last) {
  auto sizes = like.sym_sizes().vec();
  TORCH_CHECK(!sizes.empty(), "[linear] expected at least one dimension");
  sizes.back() = last;
  return at::empty_symint(sizes, like.options());
}

at::Tensor linear_meta(const at::Tensor& x, at::TensorList, int64_t, c10::SymIntArrayRef shape,
                       const OptionalTensor&) {
  return with_last_size(x, shape[0]);
}

at::Tensor backward_input_meta(const at::Tensor& grad, at::TensorList, int64_t,
                               c10::SymIntArrayRef shape) {
  return with_last_size(grad, shape[1]);
}

at::Tensor backward_weight_meta(const at::Tensor&, const at::Tensor&, at::TensorList parts, int64_t,
                                c10::SymIntArrayRef) {
  return at::empty_like(parts[0]);
}

at::Tensor call_linear(const at::Tensor& x, at::TensorList parts, int64_t format,
                       c10::SymIntArrayRef shape, const OptionalTensor& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("budwood::linear", "")
                             .typed<at::Tensor(const at::Tensor&, at::TensorList, int64_t,
                                               c10::SymIntArrayRef, const OptionalTensor&)>();
  return op.call(x, parts, format, shape, bias);
}

at::Tensor call_backward_input(const at::Tensor& grad, at::TensorList parts, int64_t format,
                               c10::SymIntArrayRef shape) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("budwood::linear_backward_input", "")
          .typed<at::Tensor(const at::Tensor&, at::TensorList, int64_t, c10::SymIntArrayRef)>();
  return op.call(grad, parts, format, shape);
}

at::Tensor call_backward_weight(const at::Tensor& grad, const at::Tensor& x, at::TensorList parts,
                                int64_t format, c10::SymIntArrayRef shape) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("budwood::linear_backward_weight", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, at::TensorList,
                                               int64_t, c10::SymIntArrayRef)>();
  return op.call(grad, x, parts, format, shape);
}

// Keeps x only when a dense W is trained; a frozen layer keeps nothing of its own.
class LinearFunction : public torch::autograd::Function<LinearFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList parts,
                            int64_t format, c10::SymIntArrayRef shape, const OptionalTensor& bias) {
    const bool train_weight = parts[0].requires_grad();
    ctx->saved_data["format"] = format;
    ctx->saved_data["shape"] = shape.vec();
    ctx->saved_data["bias"] = bias && bias->requires_grad();
    ctx->saved_data["bias_dtype"] = bias ? bias->scalar_type() : x.scalar_type();
    ctx->saved_data["weight"] = train_weight;
    auto saved = parts.vec();
    saved.push_back(train_weight ? x : at::Tensor());
    ctx->save_for_backward(std::move(saved));
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_linear(x, parts, format, shape, bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto parts = ctx->get_saved_variables();
    const auto x = parts.back();
    parts.pop_back();
    const auto format = ctx->saved_data["format"].toInt();
    const auto shape = ctx->saved_data["shape"].toSymIntVector();
    variable_list result(parts.size() + 4);
    if (ctx->needs_input_grad(0)) result[0] = call_backward_input(grads[0], parts, format, shape);
    if (ctx->saved_data["weight"].toBool())
      result[1] = call_backward_weight(grads[0], x, parts, format, shape);
    if (ctx->saved_data["bias"].toBool())
      result.back() = grads[0]
                          .reshape_symint({-1, shape[0]})
                          .sum(0)
                          .to(ctx->saved_data["bias_dtype"].toScalarType());
    return result;
  }
};

at::Tensor linear_autograd(const at::Tensor& x, at::TensorList parts, int64_t format,
                           c10::SymIntArrayRef shape, const OptionalTensor& bias) {
  TORCH_CHECK(!parts.empty(), "[linear] a weight has at least one part");
  return LinearFunction::apply(x, parts, format, shape, bias);
}

template <c10::DispatchKey key, c10::DeviceType device>
at::Tensor linear_autocast(const at::Tensor& x, at::TensorList parts, int64_t format,
                           c10::SymIntArrayRef shape, const OptionalTensor& bias) {
  c10::impl::ExcludeDispatchKeyGuard guard{key};
  return call_linear(at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device),
                     parts, format, shape, bias);
}

}  // namespace

TORCH_LIBRARY(budwood, m) {
  m.def(
      "linear(Tensor x, Tensor[] weight, int format, SymInt[] shape, Tensor? bias=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("linear_backward_input(Tensor grad, Tensor[] weight, int format, SymInt[] shape) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_backward_weight(Tensor grad, Tensor x, Tensor[] weight, int format, SymInt[] shape)"
      " -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

#define BUDWOOD_DEVICE_KERNELS(key)                           \
  TORCH_LIBRARY_IMPL(budwood, key, m) {                       \
    m.impl("linear", linear_kernel);                          \
    m.impl("linear_backward_input", backward_input_kernel);   \
    m.impl("linear_backward_weight", backward_weight_kernel); \
  }
BUDWOOD_DEVICE_KERNELS(CPU)
BUDWOOD_DEVICE_KERNELS(CUDA)
#undef BUDWOOD_DEVICE_KERNELS

TORCH_LIBRARY_IMPL(budwood, Meta, m) {
  m.impl("linear", linear_meta);
  m.impl("linear_backward_input", backward_input_meta);
  m.impl("linear_backward_weight", backward_weight_meta);
}

TORCH_LIBRARY_IMPL(budwood, Autograd, m) {
  m.impl("linear", linear_autograd);
  m.impl("linear_backward_input", torch::autograd::autogradNotImplementedFallback());
  m.impl("linear_backward_weight", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(budwood, AutocastCPU, m) {
  m.impl("linear", linear_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(budwood, AutocastCUDA, m) {
  m.impl("linear", linear_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

at::Tensor linear(const at::Tensor& x, const Weight& weight, const OptionalTensor& bias) {
  const std::array<c10::SymInt, 2> shape{weight.out, weight.in};
  return call_linear(x, weight.parts, static_cast<int64_t>(weight.format), shape, bias);
}

void link_operators() {}

}  // namespace budwood::quant
