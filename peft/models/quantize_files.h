#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace budwood::models {

struct QuantizeFilesOptions {
  std::string model;  ///< Hugging Face folder or GGUF file
  std::string out;    ///< folder, or for the formats of GGUF a file
  /// "nf4", "fp4", "int8": a folder in bitsandbytes' layout. "int4", and "int8" with a method that
  /// calibrates: a folder in Budwood's own. "q4_0", "q4_1", "q8_0", "f16", "bf16", "f32": a GGUF.
  std::string format = "nf4";
  /// "rtn" rounds to nearest; for int4 and int8 also "hqq" (no data) and "awq"; for them, nf4 and
  /// fp4 "gptq" (these two with calibration text).
  std::string method = "rtn";
  int64_t block_size = 64;    ///< elements that share a scale; not for GGUF formats
  bool double_quant = false;  ///< nf4, fp4: pack the scales too
  bool act_order = true;      ///< gptq: columns of large activations first
  bool static_groups = true;  ///< gptq: groups are runs of neighbours also with act_order
  /// Matrices whose names contain one of these stay plain.
  std::vector<std::string> skip = {"lm_head", "embed", "wte", "wpe"};
  std::string dtype = "auto";         ///< of activations and plain weights
  std::string calibration;            ///< token file (docs/formats.md), for gptq and awq
  int64_t calibration_tokens = 8192;  ///< read from its beginning
  int64_t sequence_length = 512;      ///< longest calibration sequence
  int64_t max_shard_size = 5'000'000'000;
  bool overwrite = false;  ///< what stands at `out` is exchanged when the new model is whole
  /// Called with the name of each matrix when it is done.
  std::function<void(const std::string& name)> progress;
};

/// One matrix that was packed.
struct QuantizedMatrix {
  std::string name;
  int64_t out = 0, in = 0;
  int64_t bytes = 0;
  /// ||W - Q|| / ||W||, Frobenius, for methods that round; else of the layer's output on the
  /// calibration text.
  double error = 0;
  /// The same figure of plain rounding, where the method is another one; else negative.
  double rtn_error = -1;
};

struct QuantizeFilesReport {
  std::vector<QuantizedMatrix> matrices;
  int64_t weights = 0;  ///< numbers in them
  int64_t bytes = 0;    ///< and the bytes that hold them
  double error = 0;     ///< root mean square over matrices
  std::vector<std::string> warnings;
};

/// Quantises a model on disk, matrix by matrix: memory holds what is packed already and one matrix.
/// The methods that calibrate need one pass over the blocks with their activations. The output
/// appears whole or not at all.
QuantizeFilesReport quantize_files(const QuantizeFilesOptions& options);

}  // namespace budwood::models
