#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/weight.h>
#include <functional>
#include <vector>

namespace budwood::ops {

/// What is summed over the counted positions, with e = label_smoothing, over V classes:
/// weight ((1 - e) (lse - x[label]) + e (lse - mean(x)) + z_loss lse²), lse = logsumexp(x).
struct LossOptions {
  double label_smoothing = 0.0;  ///< share of the target spread over all classes
  double z_loss = 0.0;           ///< arXiv 2204.02311
  at::Tensor weights = {};       ///< of each position, [tokens]; undefined = 1
  int64_t chunk = 128;           ///< positions that are projected at a time
};

/// The loss of hidden Wᵀ for a frozen head W [V, d]. hidden [tokens, d], labels int64 [tokens],
/// negative = ignored and never projected. The gradient of hidden is taken chunk by chunk in the
/// forward, so no more than chunk x V logits exist at once. A differentiable fp32 scalar, 0 when
/// nothing counts. Also torch.ops.budwood.linear_cross_entropy.
at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& labels,
                                const quant::Weight& head, const LossOptions& options = {});

/// The same for any head: `project` maps [n, d] to logits [n, V]. Gradients reach hidden and the
/// `parameters` that `project` uses.
at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& labels,
                                const std::function<at::Tensor(const at::Tensor&)>& project,
                                const std::vector<at::Tensor>& parameters = {},
                                const LossOptions& options = {});

/// The sum of losses of logits [tokens, V], all labels at least 0, and its gradient over the
/// logits, which may take their place; without `gradient` an empty tensor.
std::tuple<at::Tensor, at::Tensor> cross_entropy_sum(at::Tensor logits, const at::Tensor& labels,
                                                     const LossOptions& options, bool gradient);

}  // namespace budwood::ops
