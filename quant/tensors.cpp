#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <budwood/quant/fork.h>
#include <budwood/quant/tensors.h>

namespace budwood::quant {

bool kernels_take(const at::Tensor& t) {
  const auto type = t.scalar_type();
  return t.is_cpu() && (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf);
}

kernels::FloatType float_type(at::ScalarType type) {
  return type == at::kBFloat16 ? kernels::FloatType::bf16
         : type == at::kHalf   ? kernels::FloatType::fp16
                               : kernels::FloatType::fp32;
}

kernels::Threads torch_threads() {
  if (at::in_parallel_region()) return {};
  prepare_for_fork();
  return {at::get_num_threads(), [](int n, const std::function<void(int)>& body) {
            at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
            });
          }};
}

kernels::FloatRows rows_of(const at::Tensor& t, at::Tensor& keep) {
  const int64_t n = t.dim() == 0 ? 1 : t.size(-1);
  const bool simple = t.dim() == 2 && (t.stride(1) == 1 || n == 1) && t.stride(0) >= 0;
  keep = simple ? t : t.contiguous();
  return {keep.const_data_ptr(), float_type(t.scalar_type()), simple ? keep.stride(0) : n};
}

}  // namespace budwood::quant
