#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/io/gguf_tokenizer.h>
#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/models/stored_tensors.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/checkpoints/checkpoint.h>
#include <budwood/quant/error.h>
#include <array>
#include <map>
#include <optional>

namespace budwood::models {
namespace {

namespace fs = std::filesystem;

// Bytes that are converted and written at a time.
constexpr int64_t kPanelBytes = 16 << 20;

// What is written under one name.
struct Output {
  StoredTensor tensor;
  at::ScalarType dtype;
};

struct Contents {
  std::map<std::string, Output> tensors;
  std::string quantization;  // quantization_config, empty for plain weights
};

std::string layer_of(const std::string& name) {
  return name.substr(0, name.size() - std::string(".weight").size());
}

quant::CheckpointWriter writer_for(const std::map<std::string, StoredTensor>& all,
                                   at::ScalarType dtype, std::string& config) {
  std::vector<const quant::Weight*> packed;
  std::vector<std::string> plain;
  for (const auto& [name, tensor] : all) {
    if (tensor.packed())
      packed.push_back(&*tensor.matrix);
    else if (tensor.projection)
      plain.push_back(layer_of(name));
  }
  const bool tied_head = !all.contains("lm_head.weight");
  if (tied_head) plain.insert(plain.begin(), "lm_head");
  auto writer = quant::checkpoint_writer(packed, dtype);
  config = writer.config(plain);
  return writer;
}

Contents contents_of(CausalLM& model, const SaveOptions& options) {
  const auto all = stored_tensors(model, "save");
  Contents contents;
  std::optional<quant::CheckpointWriter> writer;
  if (options.weights == "packed") writer = writer_for(all, model.dtype(), contents.quantization);
  for (const auto& [name, tensor] : all) {
    if (writer && tensor.packed()) {
      for (const auto& [part, values] : writer->parts(*tensor.matrix))
        contents.tensors.emplace(layer_of(name) + "." + part,
                                 Output{{{}, values, false}, values.scalar_type()});
      continue;
    }
    // Packed matrices, and what was merged into them, stand for fp32 values; a file has no use for
    // more than the model computes with.
    auto dtype = tensor.dtype();
    if (options.dtype != "auto")
      dtype = scalar_type_of(options.dtype);
    else if (tensor.matrix && dtype == at::kFloat)
      dtype = model.dtype();
    contents.tensors.emplace(name, Output{tensor, dtype});
  }
  return contents;
}

void write_weights(const std::map<std::string, Output>& all, const fs::path& folder,
                   int64_t max_shard_size) {
  std::vector<io::TensorSpec> specs;
  for (const auto& [name, output] : all)
    specs.push_back({name, stored_dtype(output.dtype), output.tensor.shape()});
  if (max_shard_size < 1) throw Error("save", "max_shard_size is a positive number of bytes");
  io::ShardedWriter writer(folder, specs, static_cast<uint64_t>(max_shard_size));
  for (const auto& spec : writer.order()) {
    const auto& [tensor, dtype] = all.at(spec.name);
    const int64_t rows = tensor.row_count();
    const auto row_bytes = static_cast<int64_t>(spec.bytes()) / std::max<int64_t>(1, rows);
    const int64_t step = std::max<int64_t>(1, kPanelBytes / std::max<int64_t>(1, row_bytes));
    for (int64_t begin = 0; begin < rows; begin += step) {
      const auto panel = tensor.rows(begin, std::min(rows, begin + step), dtype);
      if (panel.is_floating_point() && !panel.isfinite().all().item<bool>())
        throw Error("save", fmt::format("'{}' holds values that are not finite in {}", spec.name,
                                        dtype_text(dtype)));
      writer.write(spec.name, panel.const_data_ptr(), panel.nbytes());
    }
  }
  writer.commit();
}

constexpr std::array kCarried = {"tokenizer.json",
                                 "tokenizer_config.json",
                                 "special_tokens_map.json",
                                 "added_tokens.json",
                                 "vocab.json",
                                 "merges.txt",
                                 "tokenizer.model",
                                 "chat_template.jinja",
                                 "chat_template.json",
                                 "generation_config.json"};

void carry_tokenizer(const fs::path& from, const fs::path& folder) {
  if (fs::is_directory(from)) {
    for (const char* name : kCarried)
      if (fs::exists(from / name)) io::write_file(folder / name, io::read_file(from / name));
  } else {
    io::write_tokenizer(io::GgufFile::open(from), folder);
  }
}

}  // namespace

void save(CausalLM& model, const std::string& folder, const SaveOptions& options) {
  if (options.weights != "dense" && options.weights != "packed")
    throw Error("save", fmt::format("weights is 'dense' or 'packed', found '{}'", options.weights));
  const bool packed = options.weights == "packed";
  if (packed && options.dtype != "auto" && scalar_type_of(options.dtype) != model.dtype())
    throw Error("save", fmt::format("packed weights are saved as they are: dtype is 'auto', found "
                                    "'{}'",
                                    options.dtype));
  const auto contents = contents_of(model, options);
  auto config = model.config();
  config.tie_word_embeddings = head_is_tied(model);
  io::AtomicFolder out(folder, options.overwrite ? io::Existing::replace : io::Existing::refuse);
  const auto dtype = options.dtype == "auto" ? dtype_text(model.dtype()) : options.dtype;
  io::write_file(out.path() / "config.json", config.to_json(dtype, contents.quantization));
  write_weights(contents.tensors, out.path(), options.max_shard_size);
  if (!options.tokenizer_from.empty()) carry_tokenizer(options.tokenizer_from, out.path());
  out.commit();
}

}  // namespace budwood::models
