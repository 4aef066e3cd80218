#pragma once

#include <budwood/peft/models/model.h>
#include <functional>
#include <string>
#include <vector>

namespace budwood::models {

struct CalibrateOptions {
  /// "gptq", "awq": look at what goes through each layer; "hqq": at the weights alone; "rtn":
  /// rounds to nearest (quant/calibrate/).
  std::string method = "gptq";
  /// "affine": integers with a scale and a zero point; gptq and rtn also make bitsandbytes' "nf4"
  /// and "fp4".
  std::string format = "affine";
  int64_t bits = 4;         ///< 4 or 8
  int64_t group_size = 64;  ///< columns that share a scale; -1 = a whole row
  bool symmetric = false;   ///< not for hqq
  bool act_order = false;   ///< gptq only, and so are the two below
  bool static_groups = false;
  bool double_quant = false;  ///< nf4 and fp4 only
  double damping = 0.01;
  /// Projections whose paths contain one of these are left as they are.
  std::vector<std::string> skip = {"lm_head"};
  int64_t batch_tokens = 2048;   ///< tokens that go through a block together
  int64_t search_tokens = 1024;  ///< awq: tokens on which scales are tried, at least one sequence
  /// Called after each block: blocks done, blocks in all, path of the block. What it throws ends
  /// the calibration, with the blocks so far quantised.
  std::function<void(int64_t done, int64_t total, const std::string& path)> progress = {};
};

/// What became of one projection. Errors are relative, |X (W - Ŵ)ᵀ| / |X Wᵀ| over the calibration
/// tokens as they reach this layer and |W - Ŵ| / |W|; rtn_ones are those of plain rounding. Output
/// errors are NaN when no sequences were given.
struct LayerReport {
  std::string path;
  double rtn_error = 0, error = 0;
  double rtn_weight_error = 0, weight_error = 0;
  double awq_ratio = 0;  ///< exponent of the scale on its input; 0 = none
};

struct CalibrateReport {
  std::vector<LayerReport> layers;
  int64_t tokens = 0;
  double seconds = 0;
};

/// Quantises the projections of a loaded model in place, block by block: a block is calibrated on
/// what the blocks before it, quantised already, make of the sequences. Activations and Hessians of
/// one block are held at a time. hqq and rtn take no sequences for the quantising itself, only for
/// the report. awq moves factors into the norm (or projection) that makes an input, so those
/// weights change too. Throws Error when adapters are attached and for weights that are packed.
CalibrateReport calibrate(CausalLM& model, const std::vector<std::vector<int64_t>>& sequences,
                          const CalibrateOptions& options = {});

}  // namespace budwood::models
