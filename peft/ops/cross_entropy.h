#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace budwood::ops {

/// Sum over the counted positions of -log softmax(project(h))[label]. hidden [tokens, d], labels
/// int64 [tokens], negative = ignored and never projected. `project` maps [n, d] to logits [n, V]
/// and is applied to `chunk` positions at a time; gradients are taken chunk by chunk in the
/// forward, so no more than chunk x V logits exist at once. Returns a differentiable fp32 scalar (0
/// when nothing counts). Gradients reach hidden and the `parameters` that `project` uses.
at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& labels,
                                const std::function<at::Tensor(const at::Tensor&)>& project,
                                const std::vector<at::Tensor>& parameters = {},
                                int64_t chunk = 128);

}  // namespace budwood::ops
