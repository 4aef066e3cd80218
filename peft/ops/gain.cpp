#include <ATen/ATen.h>

#include <budwood/peft/kernels/rows.h>
#include <budwood/peft/ops/gain.h>
#include <budwood/quant/tensors.h>

namespace budwood::ops {
namespace {

// Sum over tokens of a ∘ b, fp32 (fp64 for fp64).
at::Tensor sum_products(const at::Tensor& a, const at::Tensor& b) {
  if (!quant::kernels_take(a) || !quant::kernels_take(b)) {
    const auto type = at::promote_types(a.scalar_type(), at::kFloat);
    return (a.to(type) * b.to(type)).sum(0);
  }
  at::Tensor keep_a, keep_b;
  auto sums = at::empty({a.size(1)}, a.options().dtype(at::kFloat));
  kernels::sum_products(quant::rows_of(a, keep_a), quant::rows_of(b, keep_b), a.size(0), a.size(1),
                        sums.mutable_data_ptr<float>(), quant::torch_threads());
  return sums;
}

}  // namespace

at::Tensor gain_gradient(const at::Tensor& dy, const at::Tensor& y, const at::Tensor& gain,
                         const GainedProduct& made_of) {
  auto gradient = sum_products(dy, y).to(gain.scalar_type()) / gain;
  const auto zeros = (gain == 0).nonzero().flatten();
  for (int64_t i = 0; i < zeros.size(0); ++i) {
    const auto row = zeros[i].item<int64_t>();
    const auto type = gain.scalar_type();
    const auto own = dy.select(1, row).to(type);
    auto sum = own.matmul(made_of.x().to(type)).dot(made_of.weight.rows(row, row + 1, type)[0]);
    if (made_of.u.defined())
      sum = sum + own.matmul(made_of.u.to(type)).dot(made_of.b[row].to(type)) * made_of.scaling;
    gradient[row] = sum;
  }
  return gradient;
}

}  // namespace budwood::ops
