#pragma once

#include <budwood/quant/weight.h>

#include <functional>

namespace budwood {

/// A new dense weight whose rows are fold(rows of `weight` in fp64, number of the first), each
/// value rounded once to the weight's dtype (float32 when it is packed). Throws Error for a value
/// that is not finite in it, naming the rows.
quant::Weight folded_weight(const quant::Weight& weight,
                            const std::function<at::Tensor(at::Tensor, int64_t)>& fold);

}  // namespace budwood
