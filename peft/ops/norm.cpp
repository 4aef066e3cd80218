#include <ATen/ATen.h>

#include <budwood/peft/ops/norm.h>

namespace budwood::ops {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const auto type = x.scalar_type();
  const auto wide = type == at::kDouble ? x : x.to(at::kFloat);
  const auto normed = wide * at::rsqrt(wide.square().mean(-1, true) + eps);
  return weight.to(type) * normed.to(type);
}

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  return at::silu(gate) * up;
}

}  // namespace budwood::ops
