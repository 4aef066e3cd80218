#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <budwood/quant/calibrate/affine_matrix.h>
#include <budwood/quant/calibrate/awq.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/affine.h>
#include <budwood/quant/quantize.h>
#include <algorithm>
#include <cmath>

namespace budwood::quant::calibrate {
namespace {

constexpr int64_t kPanelElements = 1 << 22;

at::Tensor rounded(const at::Tensor& w, const AwqOptions& options) {
  const auto packed =
      quantize(w, {.format = options.bits == 4 ? "int4" : "affine8",
                   .block_size = group_columns("awq", options.group_size, w.size(1)),
                   .symmetric = options.symmetric});
  return packed.rows(0, packed.out, at::kFloat);
}

// [rows, in] as [rows, groups, size], the last group filled up with zeros.
at::Tensor grouped(const at::Tensor& rows, int64_t groups, int64_t size) {
  return at::constant_pad_nd(rows, {0, groups * size - rows.size(1)}).view({-1, groups, size});
}

// The blocks of the Hessian on its diagonal, [groups, size, size].
at::Tensor diagonal_blocks(const at::Tensor& hessian, int64_t groups, int64_t size) {
  auto blocks = at::zeros({groups, size, size}, at::kFloat);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * size, n = std::min(size, hessian.size(0) - first);
    blocks[g].narrow(0, 0, n).narrow(1, 0, n).copy_(
        hessian.narrow(0, first, n).narrow(1, first, n));
  }
  return blocks;
}

}  // namespace

AwqScale awq_scale(const std::vector<at::Tensor>& weights, const at::Tensor& mean_abs,
                   const std::function<double(const std::vector<at::Tensor>&)>& error,
                   const AwqOptions& options) {
  for (const auto& w : weights) check_matrix("awq", w, options.bits);
  if (weights.empty() || mean_abs.dim() != 1 || mean_abs.size(0) != weights[0].size(1))
    throw Error("awq", "wanted at least one weight and the mean |x| of each of its columns");
  if (options.ratios < 1)
    throw Error("awq", fmt::format("{} ratios; wanted 1 or more", options.ratios));
  at::NoGradGuard no_grad;
  AwqScale best;
  for (int64_t step = 0; step < options.ratios; ++step) {
    const double ratio = static_cast<double>(step) / static_cast<double>(options.ratios);
    auto scale = mean_abs.to(at::kFloat).pow(ratio).clamp_min(1e-4);
    scale = scale / (scale.max() * scale.min()).sqrt();
    std::vector<at::Tensor> candidates;
    for (const auto& w : weights)
      candidates.push_back(rounded(w.to(at::kFloat) * scale, options).div_(scale));
    const double found = error(candidates);
    if (!std::isfinite(found))
      throw Error("awq", fmt::format("the output's error with ratio {} is {}", ratio, found));
    if (step == 0) best.rtn_error = found;
    if (step == 0 || found < best.error) {
      best.scale = scale;
      best.ratio = ratio;
      best.error = found;
    }
  }
  return best;
}

at::Tensor awq_clip(const at::Tensor& w, const at::Tensor& hessian, const AwqOptions& options) {
  check_matrix("awq", w, options.bits);
  if (options.clip_steps < 0 || !(options.least_clip > 0 && options.least_clip <= 1))
    throw Error("awq", fmt::format("clip_steps {} and least_clip {}; wanted 0 or more and above 0 "
                                   "up to 1",
                                   options.clip_steps, options.least_clip));
  at::NoGradGuard no_grad;
  const int64_t out = w.size(0), in = w.size(1);
  const int64_t size = group_columns("awq", options.group_size, in),
                groups = kernels::affine_groups(in, size);
  const auto blocks = diagonal_blocks(hessian.to(at::kFloat), groups, size);
  auto result = at::empty({out, in}, at::kFloat);
  const int64_t step = std::max<int64_t>(1, kPanelElements / in);
  for (int64_t begin = 0; begin < out; begin += step) {
    const int64_t n = std::min(step, out - begin);
    const auto rows = w.detach().narrow(0, begin, n).to(at::kFloat);
    const auto range = grouped(rows, groups, size).abs().amax(2);
    const auto by_column = [&](const at::Tensor& limits) {
      return limits.repeat_interleave(size, 1).narrow(1, 0, in);
    };
    at::Tensor limit = range, least;
    for (int64_t i = 0; i <= options.clip_steps; ++i) {
      const double part = options.clip_steps == 0
                              ? 1.0
                              : 1.0 - (1.0 - options.least_clip) * static_cast<double>(i) /
                                          static_cast<double>(options.clip_steps);
      const auto tried = range * part, columns = by_column(tried);
      const auto delta = rounded(rows.clamp(-columns, columns), options) - rows;
      const auto by_group = grouped(delta, groups, size).transpose(0, 1);
      const auto error = by_group.bmm(blocks).mul_(by_group).sum(2).t();
      if (i == 0) {
        least = error;
        continue;
      }
      const auto better = error < least;
      least = at::where(better, error, least);
      limit = at::where(better, tried, limit);
    }
    const auto columns = by_column(limit);
    result.narrow(0, begin, n).copy_(rows.clamp(-columns, columns));
  }
  return result;
}

}  // namespace budwood::quant::calibrate
