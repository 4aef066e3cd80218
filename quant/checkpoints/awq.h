#pragma once

#include <budwood/quant/weight.h>
#include <string>
#include <vector>

/// Weights as AWQ checkpoints store them (AutoAWQ's "gemm" layout).
namespace budwood::quant {

/// `quantization_config` of such a checkpoint.
struct AwqConfig {
  int64_t bits = 4;
  int64_t group_size = 128;
  /// Paths with one of these in them are stored as plain matrices.
  std::vector<std::string> modules_to_not_convert;

  /// Refuses other methods, widths, layouts and files without zero points by name.
  static AwqConfig from_json(const std::string& text);
};

/// One linear [out, in], exactly: W = scale * (q - zero).
///
/// qweight int32 [in, out / 8], qzeros int32 [in / group_size, out / 8], scales floating [in /
/// group_size, out]. An Error names the tensor, what was found and what was wanted.
Weight weight_from_awq(const at::Tensor& qweight, const at::Tensor& qzeros,
                       const at::Tensor& scales, int64_t bits, int64_t group_size, int64_t out,
                       int64_t in);

}  // namespace budwood::quant
