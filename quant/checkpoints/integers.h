#pragma once

#include <budwood/quant/checkpoints/checkpoint.h>

/// Budwood's own layout of group-affine integers (docs/formats.md, "Integer weights"): what GPTQ's
/// and AWQ's layouts cannot hold, fp32 scales and zero points that need not be integers.
///
/// "weight.codes" uint8 [out, bytes of a row], "weight.scales" fp32 [out, groups], "weight.zeros"
/// uint8 or fp32 [out, groups], "weight.group_size" int64 [1], and where columns are stored in
/// another order than that of W "weight.column_order" int32 [in].
namespace budwood::quant {

/// bits: 4 or 8. Throws Error when parts and shape do not fit each other or a scale is not finite.
Weight weight_from_integers(const StoredParts& parts, int bits, int64_t out, int64_t in);

/// The same tensors from a weight of form affine4 or affine8.
StoredParts integer_parts(const Weight& weight);

/// quantization_config of a folder of such weights as JSON. `plain` lists the layers that are not
/// packed.
std::string integer_settings(int bits, const std::vector<std::string>& plain);

}  // namespace budwood::quant
