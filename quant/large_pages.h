#pragma once

#include <ATen/core/Tensor.h>

namespace budwood::quant {

/// An uninitialised tensor for a result that is about to be written whole. From 4 MB on, Linux is
/// asked to back a CPU tensor with pages of 2 MB, as NumPy does: where it can, the first write of a
/// page costs a sixth of what 512 small ones cost.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace budwood::quant
