#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <budwood/peft/ops/dispatch.h>
#include <budwood/peft/ops/dora_linear.h>
#include <budwood/peft/ops/factors.h>
#include <budwood/peft/ops/gain.h>
#include <budwood/peft/ops/kept.h>

namespace budwood::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

using Entry = at::Tensor(const at::Tensor& x, at::TensorList parts, int64_t format,
                         c10::SymIntArrayRef shape, const OptionalTensor& bias, const at::Tensor& a,
                         const at::Tensor& b, const at::Tensor& gain, double scaling);
using Forward = Pair(const at::Tensor& x, at::TensorList parts, int64_t format,
                     c10::SymIntArrayRef shape, const at::Tensor& a, const at::Tensor& b,
                     const at::Tensor& gain, double scaling);
using Backward = Four(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y,
                      const at::Tensor& u, at::TensorList parts, int64_t format,
                      c10::SymIntArrayRef shape, const at::Tensor& a, const at::Tensor& b,
                      const at::Tensor& gain, double scaling, bool need_x);

quant::Weight weight_of(const at::Tensor& x, at::TensorList parts, int64_t format,
                        at::IntArrayRef shape, const at::Tensor& a, const at::Tensor& b,
                        const at::Tensor& gain) {
  check_factors("dora_linear", x, shape, a, b);
  TORCH_CHECK(gain.dim() == 1 && gain.size(0) == shape[0], "[dora_linear] the gain is [", shape[0],
              "], found ", gain.sizes());
  TORCH_CHECK(gain.scalar_type() == a.scalar_type(),
              "[dora_linear] A and the gain have one dtype, found ", a.scalar_type(), " and ",
              gain.scalar_type());
  return quant::Weight::from_parts(parts.vec(), format, shape[0], shape[1]);
}

// (y, u) with u = x Aᵀ [tokens, r].
Pair forward_kernel(const at::Tensor& x, at::TensorList parts, int64_t format,
                    at::IntArrayRef shape, const at::Tensor& a, const at::Tensor& b,
                    const at::Tensor& gain, double scaling) {
  const auto w = weight_of(x, parts, format, shape, a, b, gain);
  const auto u = times_factor(flat(x), a.t());
  const auto right = (b * gain.unsqueeze(1)).t();
  return {w.linear(x, {.gain = gain, .left = u, .right = right, .scale = scaling}), u};
}

Four backward_kernel(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y,
                     const at::Tensor& u, at::TensorList parts, int64_t format,
                     at::IntArrayRef shape, const at::Tensor& a, const at::Tensor& b,
                     const at::Tensor& gain, double scaling, bool need_x) {
  const auto w = weight_of(x, parts, format, shape, a, b, gain);
  const auto dy = flat(grad);
  const auto column = gain.unsqueeze(1);
  const auto v = times_factor(dy, b * column).mul_(scaling);
  auto db = (factor_gradient(u, dy, scaling).t() * column).contiguous();
  auto da = factor_gradient(v, flat(x), 1.0);
  auto dgain = gain_gradient(dy, flat(y), gain, {w, [&] { return flat(x); }, u, b, scaling});
  at::Tensor dx = at::empty({0}, grad.options());
  if (need_x) dx = w.backward_input(dy, {.gain = gain, .left = v, .right = a}).view(x.sizes());
  return {dx, da, db, dgain};
}

Pair forward_meta(const at::Tensor& x, at::TensorList, int64_t, c10::SymIntArrayRef shape,
                  const at::Tensor& a, const at::Tensor&, const at::Tensor&, double) {
  return like_results(x, shape, a);
}

Four backward_meta(const at::Tensor& grad, const at::Tensor& x, const at::Tensor&,
                   const at::Tensor&, at::TensorList, int64_t, c10::SymIntArrayRef,
                   const at::Tensor& a, const at::Tensor& b, const at::Tensor& gain, double,
                   bool need_x) {
  auto dx =
      need_x ? at::empty_symint(x.sym_sizes(), grad.options()) : at::empty({0}, grad.options());
  return {dx, at::empty_like(a), at::empty_like(b), at::empty_like(gain)};
}

const Operator<Entry>& entry_operator() {
  static const Operator<Entry> op("budwood::dora_linear");
  return op;
}
const Operator<Forward>& forward_operator() {
  static const Operator<Forward> op("budwood::dora_linear_forward");
  return op;
}
const Operator<Backward>& backward_operator() {
  static const Operator<Backward> op("budwood::dora_linear_backward");
  return op;
}

// The operator without its bias.
class DoraLinear : public torch::autograd::Function<DoraLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList parts,
                            int64_t format, c10::SymIntArrayRef shape, const at::Tensor& a,
                            const at::Tensor& b, const at::Tensor& gain, double scaling) {
    ctx->saved_data["format"] = format;
    ctx->saved_data["shape"] = shape.vec();
    ctx->saved_data["scaling"] = scaling;
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, u] = forward_operator()(x, parts, format, shape, a, b, gain, scaling);
    auto saved = parts.vec();
    saved.insert(saved.end(), {keep(x), keep(y), u, a, b, gain});
    ctx->save_for_backward(std::move(saved));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const size_t n = saved.size() - 6;
    const variable_list parts(saved.begin(), saved.begin() + static_cast<int64_t>(n));
    const auto* own = saved.data() + n;
    const bool need_x = ctx->needs_input_grad(0);
    const auto type = grads[0].scalar_type();
    const auto [dx, da, db, dgain] = backward_operator()(
        grads[0], restored(own[0], type), restored(own[1], type), own[2], parts,
        ctx->saved_data["format"].toInt(), ctx->saved_data["shape"].toSymIntVector(), own[3],
        own[4], own[5], ctx->saved_data["scaling"].toDouble(), need_x);
    // x, the parts, format, shape, A, B, gain, scaling
    variable_list result(n + 7);
    if (need_x) result[0] = dx;
    result[n + 3] = da;
    result[n + 4] = db;
    result[n + 5] = dgain;
    return result;
  }
};

at::Tensor plus_bias(at::Tensor y, const OptionalTensor& bias) {
  return bias ? y + bias->to(y.scalar_type()) : y;
}

// Below autograd.
at::Tensor device_entry(const at::Tensor& x, at::TensorList parts, int64_t format,
                        c10::SymIntArrayRef shape, const OptionalTensor& bias, const at::Tensor& a,
                        const at::Tensor& b, const at::Tensor& gain, double scaling) {
  return plus_bias(std::get<0>(forward_operator()(x, parts, format, shape, a, b, gain, scaling)),
                   bias);
}

at::Tensor autograd_entry(const at::Tensor& x, at::TensorList parts, int64_t format,
                          c10::SymIntArrayRef shape, const OptionalTensor& bias,
                          const at::Tensor& a, const at::Tensor& b, const at::Tensor& gain,
                          double scaling) {
  TORCH_CHECK(!parts.empty(), "[dora_linear] a weight has at least one part");
  for (const auto& part : parts)
    TORCH_CHECK(!part.requires_grad(),
                "[dora_linear] the base weight is frozen, but it requires grad");
  return plus_bias(DoraLinear::apply(x, parts, format, shape, a, b, gain, scaling), bias);
}

// Adapters stay in their own dtype (fp32): only x follows autocast.
template <c10::DispatchKey key, c10::DeviceType device>
at::Tensor autocast_entry(const at::Tensor& x, at::TensorList parts, int64_t format,
                          c10::SymIntArrayRef shape, const OptionalTensor& bias,
                          const at::Tensor& a, const at::Tensor& b, const at::Tensor& gain,
                          double scaling) {
  c10::impl::ExcludeDispatchKeyGuard guard{key};
  const auto type = at::autocast::get_autocast_dtype(device);
  return entry_operator()(at::autocast::cached_cast(type, x, device), parts, format, shape, bias, a,
                          b, gain, scaling);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(budwood, m) {
  m.def(
      "dora_linear(Tensor x, Tensor[] weight, int format, SymInt[] shape, Tensor? bias, "
      "Tensor lora_A, Tensor lora_B, Tensor gain, float scaling) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "dora_linear_forward(Tensor x, Tensor[] weight, int format, SymInt[] shape, Tensor lora_A, "
      "Tensor lora_B, Tensor gain, float scaling) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "dora_linear_backward(Tensor grad, Tensor x, Tensor y, Tensor u, Tensor[] weight, "
      "int format, SymInt[] shape, Tensor lora_A, Tensor lora_B, Tensor gain, float scaling, "
      "bool need_x) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  implement(m, "dora_linear", device_entry);
  implement(m, "dora_linear_forward", forward_kernel);
  implement(m, "dora_linear_backward", backward_kernel);
  m.impl("dora_linear", c10::DispatchKey::Meta, device_entry);
  m.impl("dora_linear_forward", c10::DispatchKey::Meta, forward_meta);
  m.impl("dora_linear_backward", c10::DispatchKey::Meta, backward_meta);
  m.impl("dora_linear", c10::DispatchKey::Autograd, autograd_entry);
  without_gradient(m, "dora_linear_forward");
  without_gradient(m, "dora_linear_backward");
  m.impl("dora_linear", c10::DispatchKey::AutocastCPU,
         autocast_entry<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
  m.impl("dora_linear", c10::DispatchKey::AutocastCUDA,
         autocast_entry<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

at::Tensor dora_linear(const at::Tensor& x, const quant::Weight& weight, const OptionalTensor& bias,
                       const at::Tensor& a, const at::Tensor& b, const at::Tensor& gain,
                       double scaling) {
  const std::array<c10::SymInt, 2> shape{weight.out, weight.in};
  return entry_operator()(x, weight.parts, static_cast<int64_t>(weight.format), shape, bias, a, b,
                          gain, scaling);
}

}  // namespace budwood::ops
