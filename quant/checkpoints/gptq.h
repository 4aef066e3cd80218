#pragma once

#include <budwood/quant/weight.h>
#include <optional>
#include <string>

/// Weights as GPTQ checkpoints store them (AutoGPTQ, GPTQModel).
namespace budwood::quant {

/// `quantization_config` of such a checkpoint.
struct GptqConfig {
  int64_t bits = 4;          ///< 4 or 8
  int64_t group_size = 128;  ///< -1 = a whole row
  bool desc_act = false;     ///< columns were quantised in the order of their activations
  bool sym = true;
  bool v2 = false;  ///< checkpoint_format "gptq_v2": zeros are stored as they are, not minus one

  /// Refuses other methods, widths and layouts by name.
  static GptqConfig from_json(const std::string& text);
};

/// One linear [out, in], exactly: W = scale * (q - zero) as the checkpoint means it.
///
/// qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales floating
/// [groups, out], g_idx int32 [in], the group of each column, or none. With a g_idx that is not i /
/// group_size the columns are stored group by group, with their order as fifth part. An Error names
/// the tensor, what was found and what was wanted.
Weight weight_from_gptq(const at::Tensor& qweight, const at::Tensor& qzeros,
                        const at::Tensor& scales, const std::optional<at::Tensor>& g_idx,
                        int64_t bits, int64_t group_size, bool v2, int64_t out, int64_t in);

}  // namespace budwood::quant
