#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <budwood/peft/ops/dispatch.h>
#include <budwood/peft/ops/factors.h>
#include <budwood/peft/ops/kept.h>
#include <budwood/peft/ops/lora_linear.h>
#include <budwood/quant/ops.h>

namespace budwood::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Entry = at::Tensor(const at::Tensor&, at::TensorList, int64_t, c10::SymIntArrayRef,
                         const OptionalTensor&, const at::Tensor&, const at::Tensor&, double);
using Forward = Pair(const at::Tensor&, at::TensorList, int64_t, c10::SymIntArrayRef,
                     const OptionalTensor&, const at::Tensor&, const at::Tensor&, double);
using Backward = Three(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::TensorList,
                       int64_t, c10::SymIntArrayRef, const at::Tensor&, const at::Tensor&, double,
                       bool);

// Returns (y, u) with u = x Aᵀ [tokens, r], which the backward reads again.
Pair forward_kernel(const at::Tensor& x, at::TensorList parts, int64_t format,
                    at::IntArrayRef shape, const OptionalTensor& bias, const at::Tensor& a,
                    const at::Tensor& b, double scaling) {
  check_factors("lora_linear", x, shape, a, b);
  const auto w = quant::Weight::from_parts(parts.vec(), format, shape[0], shape[1]);
  const auto u = times_factor(flat(x), a.t());
  return {w.linear(x, {.bias = bias, .left = u, .right = b.t(), .scale = scaling}), u};
}

Three backward_kernel(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& u,
                      at::TensorList parts, int64_t format, at::IntArrayRef shape,
                      const at::Tensor& a, const at::Tensor& b, double scaling, bool need_x) {
  const auto w = quant::Weight::from_parts(parts.vec(), format, shape[0], shape[1]);
  const auto dy = flat(grad);
  const auto v = times_factor(dy, b).mul_(scaling);
  auto db = factor_gradient(u, dy, scaling).t().contiguous();
  auto da = factor_gradient(v, flat(x), 1.0);
  at::Tensor dx = at::empty({0}, grad.options());
  if (need_x) dx = w.backward_input(dy, {.left = v, .right = a}).view(x.sizes());
  return {dx, da, db};
}

Pair forward_meta(const at::Tensor& x, at::TensorList, int64_t, c10::SymIntArrayRef shape,
                  const OptionalTensor&, const at::Tensor& a, const at::Tensor&, double) {
  return like_results(x, shape, a);
}

Three backward_meta(const at::Tensor& grad, const at::Tensor& x, const at::Tensor&, at::TensorList,
                    int64_t, c10::SymIntArrayRef, const at::Tensor& a, const at::Tensor& b, double,
                    bool need_x) {
  auto dx =
      need_x ? at::empty_symint(x.sym_sizes(), grad.options()) : at::empty({0}, grad.options());
  return {dx, at::empty_like(a), at::empty_like(b)};
}

const Operator<Entry>& entry_operator() {
  static const Operator<Entry> op("budwood::lora_linear");
  return op;
}
const Operator<Forward>& forward_operator() {
  static const Operator<Forward> op("budwood::lora_linear_forward");
  return op;
}
const Operator<Backward>& backward_operator() {
  static const Operator<Backward> op("budwood::lora_linear_backward");
  return op;
}

class LoraLinearFunction : public torch::autograd::Function<LoraLinearFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList parts,
                            int64_t format, c10::SymIntArrayRef shape, const OptionalTensor& bias,
                            const at::Tensor& a, const at::Tensor& b, double scaling) {
    ctx->saved_data["format"] = format;
    ctx->saved_data["shape"] = shape.vec();
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["bias"] = bias && bias->requires_grad();
    ctx->saved_data["bias_dtype"] = bias ? bias->scalar_type() : x.scalar_type();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, u] = forward_operator()(x, parts, format, shape, bias, a, b, scaling);
    auto saved = parts.vec();
    saved.insert(saved.end(), {keep(x), u, a, b});
    ctx->save_for_backward(std::move(saved));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    const size_t n = saved.size() - 4;
    const variable_list parts(saved.begin(), saved.begin() + static_cast<int64_t>(n));
    const auto shape = ctx->saved_data["shape"].toSymIntVector();
    const bool need_x = ctx->needs_input_grad(0);
    auto [dx, da, db] =
        backward_operator()(grads[0], restored(saved[n], grads[0].scalar_type()), saved[n + 1],
                            parts, ctx->saved_data["format"].toInt(), shape, saved[n + 2],
                            saved[n + 3], ctx->saved_data["scaling"].toDouble(), need_x);
    // x, the parts, format, shape, bias, A, B, scaling
    variable_list result(n + 7);
    if (need_x) result[0] = dx;
    if (ctx->saved_data["bias"].toBool())
      result[n + 3] = grads[0]
                          .reshape_symint({-1, shape[0]})
                          .sum(0)
                          .to(ctx->saved_data["bias_dtype"].toScalarType());
    result[n + 4] = da;
    result[n + 5] = db;
    return result;
  }
};

at::Tensor autograd_entry(const at::Tensor& x, at::TensorList parts, int64_t format,
                          c10::SymIntArrayRef shape, const OptionalTensor& bias,
                          const at::Tensor& a, const at::Tensor& b, double scaling) {
  TORCH_CHECK(!parts.empty(), "[lora_linear] a weight has at least one part");
  for (const auto& part : parts)
    TORCH_CHECK(!part.requires_grad(),
                "[lora_linear] the base weight is frozen, but it requires "
                "grad; use linear and a separate low-rank product to train both");
  return LoraLinearFunction::apply(x, parts, format, shape, bias, a, b, scaling);
}

at::Tensor device_entry(const at::Tensor& x, at::TensorList parts, int64_t format,
                        c10::SymIntArrayRef shape, const OptionalTensor& bias, const at::Tensor& a,
                        const at::Tensor& b, double scaling) {
  return std::get<0>(forward_operator()(x, parts, format, shape, bias, a, b, scaling));
}

// Adapters stay in their own dtype (fp32): only x follows autocast.
template <c10::DispatchKey key, c10::DeviceType device>
at::Tensor autocast_entry(const at::Tensor& x, at::TensorList parts, int64_t format,
                          c10::SymIntArrayRef shape, const OptionalTensor& bias,
                          const at::Tensor& a, const at::Tensor& b, double scaling) {
  c10::impl::ExcludeDispatchKeyGuard guard{key};
  return entry_operator()(
      at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device), parts, format,
      shape, bias, a, b, scaling);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(budwood, m) {
  m.def(
      "lora_linear(Tensor x, Tensor[] weight, int format, SymInt[] shape, Tensor? bias, "
      "Tensor lora_A, Tensor lora_B, float scaling) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_forward(Tensor x, Tensor[] weight, int format, SymInt[] shape, Tensor? bias, "
      "Tensor lora_A, Tensor lora_B, float scaling) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_backward(Tensor grad, Tensor x, Tensor u, Tensor[] weight, int format, "
      "SymInt[] shape, Tensor lora_A, Tensor lora_B, float scaling, bool need_x) -> "
      "(Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  implement(m, "lora_linear", device_entry);
  implement(m, "lora_linear_forward", forward_kernel);
  implement(m, "lora_linear_backward", backward_kernel);
  m.impl("lora_linear", c10::DispatchKey::Meta, device_entry);
  m.impl("lora_linear_forward", c10::DispatchKey::Meta, forward_meta);
  m.impl("lora_linear_backward", c10::DispatchKey::Meta, backward_meta);
  m.impl("lora_linear", c10::DispatchKey::Autograd, autograd_entry);
  without_gradient(m, "lora_linear_forward");
  without_gradient(m, "lora_linear_backward");
  m.impl("lora_linear", c10::DispatchKey::AutocastCPU,
         autocast_entry<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
  m.impl("lora_linear", c10::DispatchKey::AutocastCUDA,
         autocast_entry<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

at::Tensor lora_linear(const at::Tensor& x, const quant::Weight& weight, const OptionalTensor& bias,
                       const at::Tensor& a, const at::Tensor& b, double scaling) {
  const std::array<c10::SymInt, 2> shape{weight.out, weight.in};
  return entry_operator()(x, weight.parts, static_cast<int64_t>(weight.format), shape, bias, a, b,
                          scaling);
}

}  // namespace budwood::ops
