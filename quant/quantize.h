#pragma once

#include <budwood/quant/weight.h>
#include <string>

/// Plain matrices to packed weights, without data; with data see calibrate/.
namespace budwood::quant {

struct QuantizeOptions {
  /// "nf4", "fp4": bitsandbytes' 4 bits, blocks of the flat matrix (QLoRA, arXiv 2305.14314).
  /// "int8": LLM.int8, one scale per row (arXiv 2208.07339).
  /// "int4", "affine8": unsigned integers with a scale and a zero point per group of a row.
  std::string format = "nf4";
  /// Elements that share a scale; for nf4 and fp4 a power of two from 32 to 4096. Not for int8.
  int64_t block_size = 64;
  /// nf4 and fp4 only: the scales are themselves quantised to 8 bits.
  bool double_quant = false;
  /// int4 and affine8 only: the range of a group is symmetric around 0 and so is its grid.
  bool symmetric = false;
  /// int4 and affine8 only: "rtn" rounds to nearest, "hqq" moves the zero points first
  /// (calibrate/hqq.h).
  std::string method = "rtn";
};

/// W [out, in], floating point, to parts on its device: the CPU, or one of device_products.h, where
/// the bytes are the same. On the CPU fp32 is the widest working copy and only a panel of it exists
/// at a time. NaN, infinity and values whose scale overflows are Errors that name row and column.
/// With nf4 and fp4, codes are [out, in / 2] when rows are whole blocks, else flat.
Weight quantize(const at::Tensor& w, const QuantizeOptions& options = {});

/// Throws Error for a format that quantize() does not know.
void require_quantizable(const std::string& format);
/// Throws Error for a method that quantize() does not know for this format.
void require_method(const std::string& format, const std::string& method);

}  // namespace budwood::quant
