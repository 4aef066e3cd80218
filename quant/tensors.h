#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/kernels/gemm.h>

/// Tensors as the kernels see them.
namespace budwood::quant {

/// fp32, bf16 or fp16 on the CPU: what the kernels read and write.
bool kernels_take(const at::Tensor& t);

/// The kernels' name of float32, bfloat16 or float16.
kernels::FloatType float_type(at::ScalarType type);

/// torch's own threads; none inside a parallel region.
kernels::Threads torch_threads();

/// t [..., n] seen as rows of n elements with one distance between them; what is not stored so is
/// copied first. `keep` holds what the rows point into.
kernels::FloatRows rows_of(const at::Tensor& t, at::Tensor& keep);

}  // namespace budwood::quant
