#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/quant/calibrate/hessian.h>
#include <budwood/quant/error.h>
#include <algorithm>

namespace budwood::quant::calibrate {
namespace {

// Tokens whose products are summed in one go; the means of such blocks are then averaged.
constexpr int64_t kBlockTokens = 1024;
// Rows of a difference that are multiplied at a time.
constexpr int64_t kPanelElements = 1 << 22;

}  // namespace

HessianSum::HessianSum(int64_t in)
    : mean_(at::zeros({in, in}, at::kFloat)), mean_abs_(at::zeros({in}, at::kFloat)) {}

void HessianSum::add(const at::Tensor& x) {
  const int64_t in = mean_abs_.size(0);
  if (x.dim() < 1 || x.size(-1) != in || !at::isFloatingType(x.scalar_type()))
    throw Error("HessianSum",
                fmt::format("wanted floating point inputs [..., {}], found {} [{}]", in,
                            c10::toString(x.scalar_type()), fmt::join(x.sizes(), ", ")));
  at::NoGradGuard no_grad;
  const auto rows = x.reshape({-1, in});
  for (int64_t begin = 0; begin < rows.size(0); begin += kBlockTokens) {
    const int64_t count = std::min(kBlockTokens, rows.size(0) - begin);
    const auto block = rows.narrow(0, begin, count).to(at::kFloat);
    if (!block.isfinite().all().item<bool>())
      throw Error("HessianSum", "the inputs hold values that are not finite");
    const auto before = static_cast<double>(tokens_);
    tokens_ += count;
    const auto all = static_cast<double>(tokens_);
    mean_.addmm_(block.t(), block, before / all, 1.0 / all);
    mean_abs_.mul_(before / all).add_(block.abs().sum(0), 1.0 / all);
  }
}

double output_error(const at::Tensor& delta, const at::Tensor& hessian) {
  double sum = 0;
  const int64_t step = std::max<int64_t>(1, kPanelElements / delta.size(1));
  for (int64_t begin = 0; begin < delta.size(0); begin += step) {
    const auto rows =
        delta.narrow(0, begin, std::min(step, delta.size(0) - begin)).to(hessian.scalar_type());
    sum += rows.mm(hessian).mul_(rows).sum(at::kDouble).item<double>();
  }
  return std::max(0.0, sum);
}

}  // namespace budwood::quant::calibrate
