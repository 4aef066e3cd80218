#include <ATen/ATen.h>

#include <budwood/peft/kernels/rank.h>
#include <budwood/peft/ops/factors.h>
#include <budwood/quant/panels.h>
#include <budwood/quant/tensors.h>

namespace budwood::ops {

at::Tensor flat(const at::Tensor& t) {
  return t.reshape({-1, t.size(-1)});
}

void check_factors(std::string_view name, const at::Tensor& x, at::IntArrayRef shape,
                   const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(shape.size() == 2, "[", name, "] shape is [out, in], found ", shape);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == shape[1], "[", name, "] the last dimension of x is ",
              shape[1], ", found a tensor of ", x.sizes());
  TORCH_CHECK(a.dim() == 2 && a.size(1) == shape[1], "[", name, "] A is [r, ", shape[1],
              "], found ", a.sizes());
  TORCH_CHECK(b.dim() == 2 && b.size(0) == shape[0] && b.size(1) == a.size(0), "[", name,
              "] B is [", shape[0], ", ", a.size(0), "], found ", b.sizes());
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "[", name, "] A and B have one dtype, found ",
              a.scalar_type(), " and ", b.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> like_results(const at::Tensor& x, c10::SymIntArrayRef shape,
                                                const at::Tensor& a) {
  auto sizes = x.sym_sizes().vec();
  c10::SymInt tokens = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) tokens = tokens * sizes[i];
  sizes.back() = shape[0];
  return {at::empty_symint(sizes, x.options()),
          at::empty_symint({tokens, a.sym_size(0)}, a.options())};
}

at::Tensor times_factor(const at::Tensor& t, const at::Tensor& m) {
  if (m.scalar_type() == at::kFloat && m.is_cpu() && quant::kernels_take(t))
    return quant::times_plain(t, m);
  return t.to(m.scalar_type()).mm(m);
}

at::Tensor factor_gradient(const at::Tensor& narrow, const at::Tensor& wide, double scale) {
  if (narrow.scalar_type() != at::kFloat || !quant::kernels_take(narrow) ||
      !quant::kernels_take(wide))
    return narrow.t().mm(wide.to(narrow.scalar_type())).mul_(scale);
  const auto left = narrow.stride(1) == 1 ? narrow : narrow.contiguous();
  const int64_t m = left.size(0), r = left.size(1), n = wide.size(1);
  at::Tensor keep;
  const auto rows = quant::rows_of(wide, keep);
  auto out = at::empty({r, n}, left.options());
  kernels::gradient_of_factor(left.const_data_ptr<float>(), left.stride(0), rows, m, r, n,
                              static_cast<float>(scale), out.mutable_data_ptr<float>(),
                              quant::torch_threads());
  return out;
}

}  // namespace budwood::ops
