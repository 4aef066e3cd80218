#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/fold.h>
#include <budwood/peft/kernels/fold.h>
#include <budwood/quant/error.h>
#include <algorithm>

namespace budwood {
namespace {

// Numbers that are widened to fp64 at a time.
constexpr int64_t kPanelElements = 1 << 20;

}  // namespace

quant::Weight folded_weight(const quant::Weight& weight,
                            const std::function<at::Tensor(at::Tensor, int64_t)>& fold) {
  const auto dtype = weight.dtype();
  auto merged = at::empty({weight.out, weight.in}, weight.parts[0].options().dtype(dtype));
  const int64_t step = std::max<int64_t>(1, kPanelElements / weight.in);
  for (int64_t begin = 0; begin < weight.out; begin += step) {
    const int64_t end = std::min(weight.out, begin + step);
    const auto rows = weight.rows(begin, end, at::kDouble).to(at::kCPU);
    const auto folded = fold(rows.clone(at::MemoryFormat::Contiguous), begin);
    const auto rounded = rounded_once(folded, dtype);
    if (!rounded.isfinite().all().item<bool>())
      throw Error(
          "merge",
          fmt::format("rows {} to {} of the merged weight hold values that are not finite in {}",
                      begin, end, c10::toString(dtype)));
    merged.narrow(0, begin, end - begin).copy_(rounded);
  }
  return weight.format == quant::Format::dense_transposed
             ? quant::Weight::dense_transposed(merged.t().contiguous())
             : quant::Weight::dense(std::move(merged));
}

at::Tensor rounded_once(const at::Tensor& values, at::ScalarType dtype) {
  kernels::FloatType type;
  switch (dtype) {
    case at::kFloat:
      type = kernels::FloatType::fp32;
      break;
    case at::kBFloat16:
      type = kernels::FloatType::bf16;
      break;
    case at::kHalf:
      type = kernels::FloatType::fp16;
      break;
    default:
      return values.to(dtype);
  }
  const auto wide = values.to(at::kCPU, at::kDouble).contiguous();
  auto rounded = at::empty(wide.sizes(), wide.options().dtype(dtype));
  kernels::round_once(wide.const_data_ptr<double>(), type, rounded.mutable_data_ptr(),
                      wide.numel());
  return rounded;
}

at::Tensor wide(const FloatArray& array) {
  return at::from_blob(const_cast<float*>(array.values.data()), array.shape, at::kFloat)
      .to(at::kDouble);
}

FloatArray to_array(const at::Tensor& tensor) {
  const auto flat = tensor.to(at::kFloat).contiguous();
  const auto* data = flat.const_data_ptr<float>();
  return {tensor.sizes().vec(), {data, data + flat.numel()}};
}

}  // namespace budwood
