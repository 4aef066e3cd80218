#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace budwood::ops {

/// block(x), of which only x is kept: the backward runs the block again ("gradient checkpointing",
/// arXiv 1604.06174) with the random numbers of its first run. Gradients reach x and those
/// `parameters` that the block uses, also when x itself requires none. The graph can be traversed
/// more than once. The block must not change what it reads.
at::Tensor recompute(const std::function<at::Tensor(const at::Tensor&)>& block, const at::Tensor& x,
                     const std::vector<at::Tensor>& parameters);

}  // namespace budwood::ops
