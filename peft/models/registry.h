#pragma once

#include <budwood/peft/models/model.h>
#include <budwood/peft/models/quantizing_source.h>
#include <budwood/peft/models/weight_source.h>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace budwood::models {

struct LoadOptions {
  /// dtype of weights and activations: "auto" keeps what the file says (a GGUF loads as float32),
  /// or "float32", "bfloat16", "float16". Weights whose dtype is unchanged are used straight from
  /// the mapped file.
  std::string dtype = "auto";
  /// What becomes of the blocks of a GGUF file: "packed" multiplies them as they lie in the mapped
  /// file, and dtype is then that of activations; "dense" decodes them; "auto" is packed, unless
  /// `quantize` packs them anew. Of a folder's 16-bit matrices in a float32 model, "packed"
  /// multiplies with them as they lie in the mapped file: the same numbers in half the memory,
  /// shared between processes; a merge into them rounds to 16 bits, as it does in the file. With
  /// `quantize` those are the matrices that it skips. "auto" and "dense" convert them.
  std::string weights = "auto";
  /// Quantises each matrix while loading, tensor by tensor: "nf4", "fp4", "int8", "int4",
  /// "affine8"; empty = not. What the rest of the name does not say stands in quant/quantize.h.
  std::string quantize = "";
  /// How: "rtn" rounds to nearest; "hqq", for int4 and affine8, moves the zero points first.
  std::string quantize_method = "rtn";
  int64_t block_size = 64;
  bool double_quant = false;
  /// Matrices whose names contain one of these are left as they are.
  std::vector<std::string> quantize_skip = {"lm_head", "embed", "wte", "wpe"};
  /// Sees each matrix that is quantised.
  QuantizeObserver on_quantized = {};
};

/// A model from a Hugging Face folder (config.json, safetensors, sharded or not) or a GGUF file. A
/// folder that bitsandbytes, GPTQ, AWQ or Budwood has quantised keeps its codes as they are.
/// Unknown architectures and tensors that do not belong to the model are Errors.
std::shared_ptr<CausalLM> load(const std::string& path, const LoadOptions& options = {});

/// What load() would build, without reading weights.
ModelConfig read_config(const std::string& path);

struct SaveOptions {
  std::string dtype = "auto";  ///< "auto" keeps each weight's own
  /// "dense" decodes packed weights to the dtype of activations; "packed" saves nf4, fp4 and int8
  /// in bitsandbytes' layout, which transformers opens, and other integers in Budwood's own.
  std::string weights = "dense";
  int64_t max_shard_size = 5'000'000'000;  ///< bytes of one file
  bool overwrite = false;                  ///< a folder that stands there is exchanged as a whole
  /// Folder or GGUF file the model came from: tokeniser files are carried over (or written from the
  /// GGUF's metadata). Empty = none.
  std::string tokenizer_from = "";
};

/// The model as a Hugging Face folder that transformers opens. Adapters must be merged or detached
/// before; the folder appears whole or not at all.
void save(CausalLM& model, const std::string& folder, const SaveOptions& options = {});

using ModelFactory = std::function<std::shared_ptr<CausalLM>(ModelConfig, WeightSource&)>;
/// Adds a model type; called from a static object in the model's own source file.
bool register_model(const std::string& model_type, ModelFactory factory);
/// A model over any source of weights.
std::shared_ptr<CausalLM> build(ModelConfig config, WeightSource& source);

}  // namespace budwood::models
