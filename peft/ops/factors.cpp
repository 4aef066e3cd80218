#include <ATen/ATen.h>

#include <budwood/peft/kernels/rank.h>
#include <budwood/peft/ops/factors.h>
#include <budwood/quant/panels.h>
#include <budwood/quant/tensors.h>

namespace budwood::ops {

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
