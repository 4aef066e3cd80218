#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <budwood/peft/ops/dispatch.h>
#include <budwood/peft/ops/gated.h>
#include <budwood/peft/ops/kept.h>
#include <budwood/quant/tensors.h>

namespace budwood::ops {
namespace {

using kernels::Gate;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Two = std::tuple<at::Tensor, at::Tensor>;

Gate gelu_of(std::string_view approximate) {
  TORCH_CHECK(approximate == "none" || approximate == "tanh",
              "[geglu] approximate is \"none\" or \"tanh\", found \"", approximate, "\"");
  return approximate == "tanh" ? Gate::gelu_tanh : Gate::gelu;
}

Gate gate_of(int64_t kind) {
  TORCH_CHECK(kind >= 0 && kind <= 2,
              "[gated] kind is 0 (silu), 1 (gelu) or 2 (gelu by tanh), found ", kind);
  return static_cast<Gate>(kind);
}

void check(const at::Tensor& gate, const at::Tensor& up) {
  TORCH_CHECK(gate.dim() >= 1 && gate.sym_sizes() == up.sym_sizes() &&
                  gate.scalar_type() == up.scalar_type(),
              "[gated] gate and up have one shape and dtype, found ", gate.sym_sizes(), " ",
              gate.scalar_type(), " and ", up.sym_sizes(), " ", up.scalar_type());
}

quant::kernels::MutableFloatRows target(const at::Tensor& t) {
  return {t.mutable_data_ptr(), quant::float_type(t.scalar_type()), t.size(-1)};
}
int64_t rows(const at::Tensor& x) {
  return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
}

at::Tensor plain_gate(Gate kind, const at::Tensor& g) {
  return kind == Gate::silu ? at::silu(g) : at::gelu(g, kind == Gate::gelu ? "none" : "tanh");
}

at::Tensor entry(const at::Tensor& gate, const at::Tensor& up, int64_t number) {
  check(gate, up);
  const Gate kind = gate_of(number);
  if (!quant::kernels_take(gate)) return plain_gate(kind, gate) * up;
  at::Tensor keep_gate, keep_up;
  auto y = at::empty(gate.sizes(), gate.options());
  kernels::gated(kind, quant::rows_of(gate, keep_gate), quant::rows_of(up, keep_up), rows(gate),
                 gate.size(-1), target(y), quant::torch_threads());
  return y;
}

Two backward_entry(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up,
                   int64_t number) {
  check(gate, up);
  const Gate kind = gate_of(number);
  if (!quant::kernels_take(gate)) {
    const auto dg = grad * up;
    return {kind == Gate::silu ? at::silu_backward(dg, gate)
                               : at::gelu_backward(dg, gate, kind == Gate::gelu ? "none" : "tanh"),
            grad * plain_gate(kind, gate)};
  }
  at::Tensor keep_grad, keep_gate, keep_up;
  auto dg = at::empty(gate.sizes(), gate.options()), du = at::empty(gate.sizes(), gate.options());
  kernels::gated_backward(kind, quant::rows_of(grad, keep_grad), quant::rows_of(gate, keep_gate),
                          quant::rows_of(up, keep_up), rows(gate), gate.size(-1), target(dg),
                          target(du), quant::torch_threads());
  return {dg, du};
}

at::Tensor call(const at::Tensor& gate, const at::Tensor& up, int64_t kind) {
  static const Operator<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t)> op(
      "budwood::gated");
  return op(gate, up, kind);
}

Two call_backward(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up,
                  int64_t kind) {
  static const Operator<Two(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t)> op(
      "budwood::gated_backward");
  return op(grad, gate, up, kind);
}

class GatedFunction : public torch::autograd::Function<GatedFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up,
                            int64_t kind) {
    ctx->saved_data["kind"] = kind;
    ctx->save_for_backward({keep(gate), keep(up)});
    at::AutoDispatchBelowADInplaceOrView guard;
    return call(gate, up, kind);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto type = grads[0].scalar_type();
    auto [dg, du] = call_backward(grads[0], restored(saved[0], type), restored(saved[1], type),
                                  ctx->saved_data["kind"].toInt());
    return {dg, du, {}};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(budwood, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("gated(Tensor gate, Tensor up, int kind) -> Tensor", tags);
  m.def("gated_backward(Tensor grad, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)", tags);
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor", tags);
  m.def("geglu(Tensor gate, Tensor up, str approximate) -> Tensor", tags);
  implement(m, "gated", entry);
  implement(m, "gated_backward", backward_entry);
  without_gradient(m, "gated_backward");
  m.impl("gated", c10::DispatchKey::Autograd,
         [](const at::Tensor& gate, const at::Tensor& up, int64_t kind) {
           return GatedFunction::apply(gate, up, kind);
         });
  m.impl("swiglu", c10::DispatchKey::CompositeImplicitAutograd, swiglu);
  m.impl("geglu", c10::DispatchKey::CompositeImplicitAutograd, geglu);
}

TORCH_LIBRARY_IMPL(budwood, Meta, m) {
  m.impl("gated", [](const at::Tensor& gate, const at::Tensor& up, int64_t kind) {
    check(gate, up);
    gate_of(kind);
    return at::empty_symint(gate.sym_sizes(), gate.options());
  });
  m.impl("gated_backward",
         [](const at::Tensor&, const at::Tensor& gate, const at::Tensor& up, int64_t) {
           return Two(at::empty_symint(gate.sym_sizes(), gate.options()),
                      at::empty_symint(up.sym_sizes(), up.options()));
         });
}

at::Tensor gated(Gate kind, const at::Tensor& gate, const at::Tensor& up) {
  return call(gate, up, static_cast<int64_t>(kind));
}
Two gated_backward(Gate kind, const at::Tensor& grad, const at::Tensor& gate,
                   const at::Tensor& up) {
  return call_backward(grad, gate, up, static_cast<int64_t>(kind));
}
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  return gated(Gate::silu, gate, up);
}
at::Tensor geglu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  return gated(gelu_of(approximate), gate, up);
}

}  // namespace budwood::ops
