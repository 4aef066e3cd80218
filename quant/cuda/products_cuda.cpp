#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <budwood/quant/cuda/kernels.h>
#include <budwood/quant/device_products.h>
#include <budwood/quant/device_rows.h>

namespace budwood::quant {
namespace {

kernels::FloatType float_type(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat      ? kernels::FloatType::fp32
         : t.scalar_type() == at::kBFloat16 ? kernels::FloatType::bf16
                                            : kernels::FloatType::fp16;
}

kernels::ConstFloats input(const at::Tensor& t) {
  return {t.const_data_ptr(), float_type(t)};
}

kernels::Floats output(at::Tensor& t) {
  return {t.mutable_data_ptr(), float_type(t)};
}

class CudaProducts final : public DeviceProducts {
 public:
  std::optional<int64_t> encode_4bit(const at::Tensor& w, Format format, int64_t block_size,
                                     at::Tensor& codes, at::Tensor& absmax) const override {
    const c10::cuda::CUDAGuard guard(w.device());
    auto first_bad = at::empty({1}, w.options().dtype(at::kLong));
    const kernels::Bnb4Source source{
        .type = format == Format::nf4 ? kernels::Bnb4Type::nf4 : kernels::Bnb4Type::fp4,
        .values = input(w),
        .count = w.numel(),
        .block_size = block_size};
    C10_CUDA_CHECK(cuda::encode_bnb4(
        source, codes.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr<float>(),
        reinterpret_cast<unsigned long long*>(first_bad.mutable_data_ptr<int64_t>()),
        c10::cuda::getCurrentCUDAStream()));
    // UINT64_MAX, none, reads as -1.
    const auto bad = first_bad.item<int64_t>();
    return bad < 0 ? std::nullopt : std::optional(bad);
  }

 protected:
  void decode(const Weight& w, int64_t begin, const at::Tensor& ids,
              at::Tensor& target) const override {
    const c10::cuda::CUDAGuard guard(target.device());
    const int64_t* id = ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr;
    std::visit(
        [&](const auto& rows) {
          C10_CUDA_CHECK(cuda::decode_rows(rows, begin, target.size(0), id, output(target),
                                           c10::cuda::getCurrentCUDAStream()));
        },
        device_rows(w));
  }

  void multiply_few(const Weight& w, const at::Tensor& x, at::Tensor& y) const override {
    const c10::cuda::CUDAGuard guard(x.device());
    std::visit(
        [&](const auto& rows) {
          C10_CUDA_CHECK(cuda::multiply_few(rows, input(x), static_cast<int>(x.size(0)), output(y),
                                            c10::cuda::getCurrentCUDAStream()));
        },
        device_rows(w));
  }
};

const bool registered =
    register_device_products(c10::DeviceType::CUDA, std::make_unique<CudaProducts>());

}  // namespace
}  // namespace budwood::quant
