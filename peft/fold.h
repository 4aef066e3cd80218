#pragma once

#include <budwood/peft/merge/fold_term.h>
#include <budwood/quant/weight.h>

#include <functional>

namespace budwood {

/// fp64 values in a dtype, on the CPU: rounded once, to nearest even, where torch's cast to 16 bits
/// goes through fp32 and rounds twice.
at::Tensor rounded_once(const at::Tensor& values, at::ScalarType dtype);

/// A new dense weight whose rows are fold(rows of `weight` in fp64, number of the first), each
/// value rounded once to the weight's dtype (float32 when it is packed). Throws Error for a value
/// that is not finite in it, naming the rows.
quant::Weight folded_weight(const quant::Weight& weight,
                            const std::function<at::Tensor(at::Tensor, int64_t)>& fold);

/// Arrays of adapter files as tensors, in fp64, and the reverse, in fp32.
at::Tensor wide(const FloatArray& array);
FloatArray to_array(const at::Tensor& tensor);

}  // namespace budwood
