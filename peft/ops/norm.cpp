#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <budwood/peft/kernels/rows.h>
#include <budwood/peft/ops/dispatch.h>
#include <budwood/peft/ops/kept.h>
#include <budwood/peft/ops/norm.h>
#include <budwood/quant/tensors.h>

namespace budwood::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check(const char* where, const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.sym_size(0) == x.sym_size(-1), "[", where,
              "] x is [..., n] and weight [n], found ", x.sym_sizes(), " and ", weight.sym_sizes());
}

at::Tensor wide(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat);
}
at::Tensor floats(const at::Tensor& t) {
  return t.to(at::kFloat).contiguous();
}
at::Tensor gradient_of(const at::Tensor& like, bool needed) {
  return needed ? at::empty(like.sizes(), like.options().dtype(at::kFloat))
                : at::empty({0}, like.options().dtype(at::kFloat));
}
float* data_or_null(const at::Tensor& t) {
  return t.numel() == 0 ? nullptr : t.mutable_data_ptr<float>();
}
quant::kernels::MutableFloatRows target(const at::Tensor& t) {
  return {t.mutable_data_ptr(), quant::float_type(t.scalar_type()), t.size(-1)};
}
int64_t rows(const at::Tensor& x) {
  return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
}
at::Tensor sum_rows(const at::Tensor& t) {
  return t.reshape({-1, t.size(-1)}).sum(0);
}

at::Tensor rms_entry(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check("rms_norm", x, weight);
  if (!quant::kernels_take(x)) {
    const auto w = wide(x), normed = w * at::rsqrt(w.square().mean(-1, true) + eps);
    return weight.to(x.scalar_type()) * normed.to(x.scalar_type());
  }
  at::Tensor keep;
  auto y = at::empty(x.sizes(), x.options());
  kernels::rms_norm(quant::rows_of(x, keep), rows(x), x.size(-1),
                    floats(weight).const_data_ptr<float>(), static_cast<float>(eps), target(y),
                    quant::torch_threads());
  return y;
}

Two rms_backward_entry(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                       double eps, bool need_weight) {
  check("rms_norm_backward", x, weight);
  if (!quant::kernels_take(x)) {
    const auto v = wide(x), dy = wide(grad), weighted = dy * weight;
    const auto scale = at::rsqrt(v.square().mean(-1, true) + eps);
    const auto pull = (weighted * v).mean(-1, true) * scale.pow(3);
    auto dweight = need_weight ? sum_rows(dy * v * scale) : at::empty({0}, weight.options());
    return {(weighted * scale - v * pull).to(x.scalar_type()), dweight.to(weight.scalar_type())};
  }
  at::Tensor keep_grad, keep_x;
  auto dx = at::empty(x.sizes(), x.options());
  auto dweight = gradient_of(weight, need_weight);
  kernels::rms_norm_backward(quant::rows_of(grad, keep_grad), quant::rows_of(x, keep_x), rows(x),
                             x.size(-1), floats(weight).const_data_ptr<float>(),
                             static_cast<float>(eps), target(dx), data_or_null(dweight),
                             quant::torch_threads());
  return {dx, dweight.to(weight.scalar_type())};
}

at::Tensor layer_entry(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       double eps) {
  check("layer_norm", x, weight);
  check("layer_norm", x, bias);
  if (!quant::kernels_take(x))
    return at::layer_norm(x, {x.size(-1)}, weight.to(x.scalar_type()), bias.to(x.scalar_type()),
                          eps);
  at::Tensor keep;
  auto y = at::empty(x.sizes(), x.options());
  kernels::layer_norm(quant::rows_of(x, keep), rows(x), x.size(-1),
                      floats(weight).const_data_ptr<float>(), floats(bias).const_data_ptr<float>(),
                      static_cast<float>(eps), target(y), quant::torch_threads());
  return y;
}

Three layer_backward_entry(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                           double eps, bool need_weight) {
  check("layer_norm_backward", x, weight);
  const auto type = weight.scalar_type();
  if (!quant::kernels_take(x)) {
    const auto v = wide(x), dy = wide(grad), weighted = dy * weight;
    const auto centred = v - v.mean(-1, true);
    const auto scale = at::rsqrt(centred.square().mean(-1, true) + eps);
    const auto normed = centred * scale;
    const auto dx =
        scale * (weighted - weighted.mean(-1, true) - normed * (weighted * normed).mean(-1, true));
    const auto none = at::empty({0}, weight.options());
    return {dx.to(x.scalar_type()), need_weight ? sum_rows(dy * normed).to(type) : none,
            need_weight ? sum_rows(dy).to(type) : none};
  }
  at::Tensor keep_grad, keep_x;
  auto dx = at::empty(x.sizes(), x.options());
  auto dweight = gradient_of(weight, need_weight), dbias = gradient_of(weight, need_weight);
  kernels::layer_norm_backward(quant::rows_of(grad, keep_grad), quant::rows_of(x, keep_x), rows(x),
                               x.size(-1), floats(weight).const_data_ptr<float>(),
                               static_cast<float>(eps), target(dx), data_or_null(dweight),
                               data_or_null(dbias), quant::torch_threads());
  return {dx, dweight.to(type), dbias.to(type)};
}

using RmsForward = Operator<at::Tensor(const at::Tensor&, const at::Tensor&, double)>;
using LayerForward =
    Operator<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double)>;

class RmsNormFunction : public torch::autograd::Function<RmsNormFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            double eps) {
    ctx->saved_data["eps"] = eps;
    ctx->save_for_backward({keep(x), weight});
    at::AutoDispatchBelowADInplaceOrView guard;
    return rms_norm(x, weight, eps);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    auto [dx, dweight] =
        rms_norm_backward(grads[0], restored(saved[0], grads[0].scalar_type()), saved[1],
                          ctx->saved_data["eps"].toDouble(), ctx->needs_input_grad(1));
    return {dx, ctx->needs_input_grad(1) ? dweight : at::Tensor(), {}};
  }
};

class LayerNormFunction : public torch::autograd::Function<LayerNormFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& bias, double eps) {
    ctx->saved_data["eps"] = eps;
    ctx->save_for_backward({keep(x), weight});
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_norm(x, weight, bias, eps);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const bool both = ctx->needs_input_grad(1) || ctx->needs_input_grad(2);
    auto [dx, dweight, dbias] =
        layer_norm_backward(grads[0], restored(saved[0], grads[0].scalar_type()), saved[1],
                            ctx->saved_data["eps"].toDouble(), both);
    return {dx, both ? dweight : at::Tensor(), both ? dbias : at::Tensor(), {}};
  }
};

at::Tensor like_sym(const at::Tensor& t) {
  return at::empty_symint(t.sym_sizes(), t.options());
}
at::Tensor like_or_none(const at::Tensor& t, bool needed) {
  return needed ? like_sym(t) : at::empty({0}, t.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(budwood, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", tags);
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool need_weight) -> "
      "(Tensor, Tensor)",
      tags);
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", tags);
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool need_weight) -> "
      "(Tensor, Tensor, Tensor)",
      tags);
  implement(m, "rms_norm", rms_entry);
  implement(m, "rms_norm_backward", rms_backward_entry);
  implement(m, "layer_norm", layer_entry);
  implement(m, "layer_norm_backward", layer_backward_entry);
  without_gradient(m, "rms_norm_backward");
  without_gradient(m, "layer_norm_backward");
  m.impl("rms_norm", c10::DispatchKey::Autograd,
         [](const at::Tensor& x, const at::Tensor& weight, double eps) {
           return RmsNormFunction::apply(x, weight, eps);
         });
  m.impl("layer_norm", c10::DispatchKey::Autograd,
         [](const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
           return LayerNormFunction::apply(x, weight, bias, eps);
         });
}

TORCH_LIBRARY_IMPL(budwood, Meta, m) {
  m.impl("rms_norm", [](const at::Tensor& x, const at::Tensor& weight, double) {
    check("rms_norm", x, weight);
    return like_sym(x);
  });
  m.impl("rms_norm_backward",
         [](const at::Tensor&, const at::Tensor& x, const at::Tensor& weight, double, bool need) {
           return Two(like_sym(x), like_or_none(weight, need));
         });
  m.impl("layer_norm",
         [](const at::Tensor& x, const at::Tensor& weight, const at::Tensor&, double) {
           check("layer_norm", x, weight);
           return like_sym(x);
         });
  m.impl("layer_norm_backward",
         [](const at::Tensor&, const at::Tensor& x, const at::Tensor& weight, double, bool need) {
           return Three(like_sym(x), like_or_none(weight, need), like_or_none(weight, need));
         });
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  static const RmsForward op("budwood::rms_norm");
  return op(x, weight, eps);
}

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                      double eps) {
  static const LayerForward op("budwood::layer_norm");
  return op(x, weight, bias, eps);
}

Two rms_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                      double eps, bool need_weight) {
  static const Operator<Two(const at::Tensor&, const at::Tensor&, const at::Tensor&, double, bool)>
      op("budwood::rms_norm_backward");
  return op(grad, x, weight, eps, need_weight);
}

Three layer_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                          double eps, bool need_weight) {
  static const Operator<Three(const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
                              bool)>
      op("budwood::layer_norm_backward");
  return op(grad, x, weight, eps, need_weight);
}

}  // namespace budwood::ops
