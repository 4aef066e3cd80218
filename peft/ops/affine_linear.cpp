#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <budwood/peft/ops/affine_linear.h>
#include <budwood/peft/ops/dispatch.h>
#include <algorithm>

namespace budwood::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Numbers of a gradient of W that exist at a time.
constexpr int64_t kPanelElements = int64_t{1} << 20;

using Forward = at::Tensor(const at::Tensor&, at::TensorList, int64_t, c10::SymIntArrayRef,
                           const OptionalTensor&, const at::Tensor&, const OptionalTensor&);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&,
                                                                const at::Tensor&, at::TensorList,
                                                                int64_t, c10::SymIntArrayRef,
                                                                const at::Tensor&,
                                                                const OptionalTensor&, bool, bool);

quant::Weight weight_of(at::TensorList parts, int64_t format, at::IntArrayRef shape,
                        const at::Tensor& scales, const OptionalTensor& zeros) {
  TORCH_CHECK(shape.size() == 2, "[affine_linear] shape is [out, in], found ", shape);
  const auto w = quant::Weight::from_parts(parts.vec(), format, shape[0], shape[1]);
  TORCH_CHECK(is_affine(w), "[affine_linear] wants a group-affine weight, found ",
              quant::form_of(w.format).name());
  TORCH_CHECK(scales.sizes() == w.parts[1].sizes() && scales.scalar_type() == at::kFloat,
              "[affine_linear] scales are fp32 ", w.parts[1].sizes(), ", found ",
              scales.scalar_type(), " ", scales.sizes());
  TORCH_CHECK(
      !zeros || (zeros->sizes() == w.parts[1].sizes() && zeros->scalar_type() == at::kFloat),
      "[affine_linear] zeros are fp32 ", w.parts[1].sizes(), ", found ", zeros->scalar_type(), " ",
      zeros->sizes());
  return with_scales(w, scales, zeros ? *zeros : at::Tensor());
}

at::Tensor forward_kernel(const at::Tensor& x, at::TensorList parts, int64_t format,
                          at::IntArrayRef shape, const OptionalTensor& bias,
                          const at::Tensor& scales, const OptionalTensor& zeros) {
  return weight_of(parts, format, shape, scales, zeros).linear(x, {.bias = bias});
}

// The group of each column of W.
at::Tensor groups_of(const quant::Weight& w) {
  const auto size = w.parts[3].item<int64_t>();
  const auto stored = at::arange(w.in, w.parts[0].options().dtype(at::kLong)).floor_divide(size);
  if (w.parts.size() < 5) return stored;
  return at::empty_like(stored).scatter_(0, w.parts[4].to(at::kLong), stored);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_kernel(
    const at::Tensor& grad, const at::Tensor& x, at::TensorList parts, int64_t format,
    at::IntArrayRef shape, const at::Tensor& scales, const OptionalTensor& zeros, bool need_x,
    bool need_zeros) {
  const auto w = weight_of(parts, format, shape, scales, zeros);
  const auto unit = with_scales(w, at::ones_like(scales));
  const auto dy = grad.reshape({-1, w.out});
  const auto inputs = x.reshape({-1, w.in}).to(at::kFloat);
  const auto group = groups_of(w);
  auto d_scales = at::zeros_like(scales);
  auto d_zeros = need_zeros ? at::zeros_like(scales) : at::empty({0}, scales.options());
  const int64_t step = std::max<int64_t>(1, kPanelElements / w.in);
  for (int64_t begin = 0; begin < w.out; begin += step) {
    const int64_t rows = std::min(step, w.out - begin);
    const auto dw = dy.narrow(1, begin, rows).to(at::kFloat).t().mm(inputs);
    d_scales.narrow(0, begin, rows)
        .index_add_(1, group, dw * unit.rows(begin, begin + rows, at::kFloat));
    if (need_zeros) d_zeros.narrow(0, begin, rows).index_add_(1, group, dw);
  }
  if (need_zeros) d_zeros.mul_(scales).neg_();
  auto dx = need_x ? w.backward_input(dy).view(x.sizes()) : at::empty({0}, grad.options());
  return {dx, d_scales, d_zeros};
}

at::Tensor forward_meta(const at::Tensor& x, at::TensorList, int64_t, c10::SymIntArrayRef shape,
                        const OptionalTensor&, const at::Tensor&, const OptionalTensor&) {
  auto sizes = x.sym_sizes().vec();
  sizes.back() = shape[0];
  return at::empty_symint(sizes, x.options());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_meta(
    const at::Tensor& grad, const at::Tensor& x, at::TensorList, int64_t, c10::SymIntArrayRef,
    const at::Tensor& scales, const OptionalTensor&, bool need_x, bool need_zeros) {
  return {need_x ? at::empty_symint(x.sym_sizes(), grad.options()) : at::empty({0}, grad.options()),
          at::empty_like(scales),
          need_zeros ? at::empty_like(scales) : at::empty({0}, scales.options())};
}

const Operator<Forward>& forward_operator() {
  static const Operator<Forward> op("budwood::affine_linear");
  return op;
}
const Operator<Backward>& backward_operator() {
  static const Operator<Backward> op("budwood::affine_linear_backward");
  return op;
}

class AffineLinear : public torch::autograd::Function<AffineLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList parts,
                            int64_t format, c10::SymIntArrayRef shape, const OptionalTensor& bias,
                            const at::Tensor& scales, const OptionalTensor& zeros) {
    ctx->saved_data["format"] = format;
    ctx->saved_data["shape"] = shape.vec();
    ctx->saved_data["zeros"] = zeros.has_value();
    ctx->saved_data["need_zeros"] = zeros && zeros->requires_grad();
    ctx->saved_data["bias"] = bias && bias->requires_grad();
    ctx->saved_data["bias_dtype"] = bias ? bias->scalar_type() : x.scalar_type();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto saved = parts.vec();
    saved.insert(saved.end(), {x, scales});
    if (zeros) saved.push_back(*zeros);
    ctx->save_for_backward(std::move(saved));
    return forward_operator()(x, parts, format, shape, bias, scales, zeros);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const bool has_zeros = ctx->saved_data["zeros"].toBool();
    const size_t n = saved.size() - (has_zeros ? 3 : 2);
    const variable_list parts(saved.begin(), saved.begin() + static_cast<int64_t>(n));
    const auto shape = ctx->saved_data["shape"].toSymIntVector();
    const bool need_x = ctx->needs_input_grad(0);
    const bool need_zeros = ctx->saved_data["need_zeros"].toBool();
    const auto zeros = has_zeros ? OptionalTensor(saved[n + 2]) : OptionalTensor();
    const auto [dx, d_scales, d_zeros] =
        backward_operator()(grads[0], saved[n], parts, ctx->saved_data["format"].toInt(), shape,
                            saved[n + 1], zeros, need_x, need_zeros);
    // x, the parts, format, shape, bias, scales, zeros
    variable_list result(n + 6);
    if (need_x) result[0] = dx;
    if (ctx->saved_data["bias"].toBool())
      result[n + 3] = grads[0]
                          .reshape_symint({-1, shape[0]})
                          .sum(0)
                          .to(ctx->saved_data["bias_dtype"].toScalarType());
    result[n + 4] = d_scales;
    if (need_zeros) result[n + 5] = d_zeros;
    return result;
  }
};

at::Tensor autograd_entry(const at::Tensor& x, at::TensorList parts, int64_t format,
                          c10::SymIntArrayRef shape, const OptionalTensor& bias,
                          const at::Tensor& scales, const OptionalTensor& zeros) {
  return AffineLinear::apply(x, parts, format, shape, bias, scales, zeros);
}

}  // namespace

bool is_affine(const quant::Weight& weight) {
  return weight.format == quant::Format::affine4 || weight.format == quant::Format::affine8;
}

quant::Weight with_scales(const quant::Weight& weight, const at::Tensor& scales,
                          const at::Tensor& zeros) {
  auto result = weight;
  result.parts[1] = scales.detach().contiguous();
  if (zeros.defined()) result.parts[2] = zeros.detach().contiguous();
  return result;
}

at::Tensor affine_linear(const at::Tensor& x, const quant::Weight& weight,
                         const std::optional<at::Tensor>& bias, const at::Tensor& scales,
                         const at::Tensor& zeros) {
  const std::vector<c10::SymInt> shape = {weight.out, weight.in};
  return forward_operator()(x, weight.parts, static_cast<int64_t>(weight.format), shape, bias,
                            scales, zeros.defined() ? OptionalTensor(zeros) : OptionalTensor());
}

TORCH_LIBRARY_FRAGMENT(budwood, m) {
  m.def(
      "affine_linear(Tensor x, Tensor[] weight, int format, SymInt[] shape, Tensor? bias, "
      "Tensor scales, Tensor? zeros) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "affine_linear_backward(Tensor grad, Tensor x, Tensor[] weight, int format, SymInt[] shape, "
      "Tensor scales, Tensor? zeros, bool need_x, bool need_zeros) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  implement(m, "affine_linear", forward_kernel);
  implement(m, "affine_linear_backward", backward_kernel);
  m.impl("affine_linear", c10::DispatchKey::Meta, forward_meta);
  m.impl("affine_linear_backward", c10::DispatchKey::Meta, backward_meta);
  m.impl("affine_linear", c10::DispatchKey::Autograd, autograd_entry);
  without_gradient(m, "affine_linear_backward");
}

}  // namespace budwood::ops
