#pragma once

#include <budwood/quant/checkpoints/checkpoint.h>

/// The layout of bitsandbytes 0.50 in safetensors files (Linear4bit, Linear8bitLt).
///
/// 4 bit: "weight" (codes), "weight.absmax", "weight.quant_map", with double quantisation
/// "weight.nested_absmax" and "weight.nested_quant_map", and the settings as JSON bytes in
/// "weight.quant_state.bitsandbytes__nf4" (or __fp4). 8 bit: "weight" int8 [out, in], "SCB" fp32
/// [out] and, in some versions, "weight_format" (0).
namespace budwood::quant {

/// Throws Error when parts, settings and shape do not fit each other, an absmax is not finite, the
/// code table is not that of the type, or the codes were repacked for one device.
Weight weight_from_bnb4(const StoredParts& parts, int64_t out, int64_t in);
Weight weight_from_bnb8(const StoredParts& parts, int64_t out, int64_t in);

/// The same tensors from a weight of form nf4, fp4 or int8_rows. dtype: float32, bfloat16 or
/// float16, what bitsandbytes dequantises to.
StoredParts bnb_parts(const Weight& weight, at::ScalarType dtype);

}  // namespace budwood::quant
