#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/quant/kernels/gemm.h>
#include <budwood/quant/weight.h>
#include <cstdint>

/// Products of tensors on the CPU with a matrix W [rows, cols] that is stored in any form and never
/// held whole: kernels/gemm.h with torch's threads.
namespace budwood::quant {

/// True when gemm.h multiplies such tensors: fp32, bf16 or fp16 on the CPU, the low-rank term fp32.
bool has_gemm(const at::Tensor& x, const Terms& terms);

/// A plain matrix of fp32, bf16 or fp16 with contiguous rows; valid while m lives.
kernels::DenseMatrix plain_matrix(const at::Tensor& m);

/// What a gain multiplies: rows of the stored matrix, or its columns where that is Wᵀ.
using Along = kernels::ScaledMatrix::Along;

/// x Wᵀ + terms: [..., cols] -> [..., rows] in the dtype of x. float64, whose gain is along rows,
/// goes panel by panel through ATen.
at::Tensor panel_linear(const kernels::Matrix& w, const at::Tensor& x, const Terms& terms = {},
                        Along gain = Along::rows);

/// x W + terms: [..., rows] -> [..., cols] in the dtype of x; sums are fp32 or wider.
at::Tensor panel_backward_input(const kernels::Matrix& w, const at::Tensor& x,
                                const Terms& terms = {}, Along gain = Along::rows);

/// x Mᵀ (x M) in fp32, for plain matrices in fp32, bf16 or fp16, with fp32 arithmetic.
at::Tensor times_plain_transposed(const at::Tensor& x, const at::Tensor& m);
at::Tensor times_plain(const at::Tensor& x, const at::Tensor& m);

/// Rows [begin, end) as [end - begin, cols].
at::Tensor panel_rows(const kernels::Matrix& w, int64_t begin, int64_t end, at::ScalarType dtype);

/// Rows chosen by ids (int64, any shape): [..., cols]. Throws Error for an id outside the matrix.
at::Tensor panel_gather(const kernels::Matrix& w, const at::Tensor& ids, at::ScalarType dtype);

}  // namespace budwood::quant
