#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <budwood/peft/kernels/rows.h>
#include <budwood/peft/ops/dispatch.h>
#include <budwood/peft/ops/rotary.h>
#include <budwood/quant/tensors.h>

namespace budwood::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  TORCH_CHECK(x.dim() == 3 && cos.dim() == 2 && cos.sym_sizes() == sin.sym_sizes() &&
                  cos.sym_size(0) == x.sym_size(0) && cos.sym_size(1) * 2 <= x.sym_size(2),
              "[rotary] x is [tokens, heads, d], cos and sin are [tokens, n/2] with n <= d; found ",
              x.sym_sizes(), ", ", cos.sym_sizes(), " and ", sin.sym_sizes());
}

at::Tensor entry(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool back) {
  check(x, cos, sin);
  const int64_t half = cos.size(1), d = x.size(2);
  if (!quant::kernels_take(x)) {
    const auto c = cos.unsqueeze(1).to(x.scalar_type());
    const auto s =
        back ? -sin.unsqueeze(1).to(x.scalar_type()) : sin.unsqueeze(1).to(x.scalar_type());
    const auto a = x.narrow(2, 0, half), b = x.narrow(2, half, half);
    return at::cat({a * c - b * s, b * c + a * s, x.narrow(2, 2 * half, d - 2 * half)}, -1);
  }
  const auto heads_together = x.stride(2) == 1 && x.stride(1) == d;
  const auto rows = heads_together ? x : x.contiguous();
  const auto c = cos.to(at::kFloat).contiguous(), s = sin.to(at::kFloat).contiguous();
  const auto type = quant::float_type(x.scalar_type());
  auto y = at::empty(x.sizes(), x.options());
  kernels::rotate({rows.const_data_ptr(), type, rows.stride(0)}, x.size(0), x.size(1), d, 2 * half,
                  c.const_data_ptr<float>(), s.const_data_ptr<float>(), back,
                  {y.mutable_data_ptr(), type, x.size(1) * d}, quant::torch_threads());
  return y;
}

at::Tensor call(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool back) {
  static const Operator<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool)>
      op("budwood::rotary");
  return op(x, cos, sin, back);
}

class RotaryFunction : public torch::autograd::Function<RotaryFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin, bool back) {
    ctx->saved_data["back"] = back;
    ctx->save_for_backward({cos, sin});
    at::AutoDispatchBelowADInplaceOrView guard;
    return call(x, cos, sin, back);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    return {call(grads[0], saved[0], saved[1], !ctx->saved_data["back"].toBool()), {}, {}, {}};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(budwood, m) {
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool back=False) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  implement(m, "rotary", entry);
  m.impl("rotary", c10::DispatchKey::Autograd,
         [](const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool back) {
           return RotaryFunction::apply(x, cos, sin, back);
         });
  m.impl("rotary", c10::DispatchKey::Meta,
         [](const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool) {
           check(x, cos, sin);
           return at::empty_symint(x.sym_sizes(), x.options());
         });
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  return call(x, cos, sin, false);
}

}  // namespace budwood::ops
