#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/io/gguf_tokenizer.h>
#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/slot.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/checkpoints/checkpoint.h>
#include <budwood/quant/error.h>
#include <array>
#include <functional>
#include <map>
#include <optional>

namespace budwood::models {
namespace {

namespace fs = std::filesystem;

// Bytes that are converted and written at a time.
constexpr int64_t kPanelBytes = 16 << 20;

struct Stored {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  /// Rows [begin, end) in the given dtype; one-dimensional tensors are one row.
  std::function<at::Tensor(int64_t begin, int64_t end, at::ScalarType)> rows;
};

// Packed weights, and what was merged into them, stand for fp32 values; a file has no use for more
// than the model computes with.
Stored stored(const quant::Weight& w, at::ScalarType activations) {
  const auto type = w.dtype() == at::kFloat ? activations : w.dtype();
  return {type, {w.out, w.in}, [&w](int64_t begin, int64_t end, at::ScalarType type) {
            return w.rows(begin, end, type);
          }};
}

Stored stored(const at::Tensor& t) {
  return {t.scalar_type(), t.sizes().vec(), [t](int64_t begin, int64_t end, at::ScalarType type) {
            return (t.dim() > 1 ? t.narrow(0, begin, end - begin) : t).to(type);
          }};
}

void check_plain(const std::string& path, const LinearSlotImpl& slot) {
  if (slot.merged().empty() && !slot.adapter_names().empty())
    throw Error("save", fmt::format("'{}' has the adapter '{}', which a plain model cannot hold: "
                                    "merge or detach it first",
                                    path, slot.adapter_names()[0]));
}

// A merge into the head gives it a weight of its own; the files must then say so.
bool head_is_tied(CausalLM& model) {
  if (!model.config().tie_word_embeddings) return false;
  const auto modules = model.named_modules("", /*include_self=*/false);
  const auto* head = dynamic_cast<LinearSlotImpl*>(modules["lm_head"].get());
  const auto* table = dynamic_cast<EmbeddingSlotImpl*>(modules["model.embed_tokens"].get());
  return head && table && head->weight().parts[0].is_same(table->weight().parts[0]);
}

struct Contents {
  std::map<std::string, Stored> tensors;
  std::string quantization;  // quantization_config, empty for plain weights
};

// The matrices that are packed, and the paths of the projections that are not.
struct Packing {
  std::vector<const quant::Weight*> weights;
  std::vector<std::string> plain;
};

Packing packing_of(CausalLM& model) {
  Packing result;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto* slot = dynamic_cast<const LinearSlotImpl*>(item.value().get());
    if (slot && slot->weight().packed())
      result.weights.push_back(&slot->weight());
    else if (slot)
      result.plain.push_back(item.key());
  }
  return result;
}

Contents contents_of(CausalLM& model, bool packed) {
  const bool tied = head_is_tied(model);
  std::optional<quant::CheckpointWriter> writer;
  Contents contents;
  if (packed) {
    const auto packing = packing_of(model);
    writer = quant::checkpoint_writer(packing.weights, model.dtype());
    contents.quantization = writer->config(packing.plain);
  }
  auto& all = contents.tensors;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto& path = item.key();
    auto* module = item.value().get();
    if (dynamic_cast<Adapter*>(module)) continue;
    if (const auto* slot = dynamic_cast<LinearSlotImpl*>(module)) {
      check_plain(path, *slot);
      if (path == "lm_head" && tied) continue;
      if (writer && slot->weight().packed())
        for (const auto& [part, tensor] : writer->parts(slot->weight()))
          all.emplace(path + "." + part, stored(tensor));
      else
        all.emplace(path + ".weight", stored(slot->weight(), model.dtype()));
      if (slot->bias().defined()) all.emplace(path + ".bias", stored(slot->bias()));
    } else if (const auto* table = dynamic_cast<EmbeddingSlotImpl*>(module)) {
      all.emplace(path + ".weight", stored(table->weight(), model.dtype()));
    } else {
      for (const auto& p : module->named_parameters(/*recurse=*/false))
        all.emplace(path + "." + p.key(), stored(p.value()));
    }
  }
  return contents;
}

void write_weights(const std::map<std::string, Stored>& all, const fs::path& folder,
                   const SaveOptions& options) {
  const bool keep = options.dtype == "auto";
  std::vector<io::TensorSpec> specs;
  for (const auto& [name, tensor] : all)
    specs.push_back(
        {name, stored_dtype(keep ? tensor.dtype : scalar_type_of(options.dtype)), tensor.shape});
  if (options.max_shard_size < 1)
    throw Error("save", "max_shard_size is a positive number of bytes");
  io::ShardedWriter writer(folder, specs, static_cast<uint64_t>(options.max_shard_size));
  for (const auto& spec : writer.order()) {
    const auto& tensor = all.at(spec.name);
    const auto type = scalar_type(spec.dtype);
    const int64_t rows = tensor.shape.size() > 1 ? tensor.shape[0] : 1;
    const auto row_bytes = static_cast<int64_t>(spec.bytes()) / std::max<int64_t>(1, rows);
    const int64_t step = std::max<int64_t>(1, kPanelBytes / std::max<int64_t>(1, row_bytes));
    for (int64_t begin = 0; begin < rows; begin += step) {
      const auto panel = tensor.rows(begin, std::min(rows, begin + step), type).contiguous();
      if (panel.is_floating_point() && !panel.isfinite().all().item<bool>())
        throw Error("save", fmt::format("'{}' holds values that are not finite in {}", spec.name,
                                        dtype_text(type)));
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
  const auto contents = contents_of(model, packed);
  auto config = model.config();
  config.tie_word_embeddings = head_is_tied(model);
  io::AtomicFolder out(folder, options.overwrite ? io::Existing::replace : io::Existing::refuse);
  const auto dtype = options.dtype == "auto" ? dtype_text(model.dtype()) : options.dtype;
  io::write_file(out.path() / "config.json", config.to_json(dtype, contents.quantization));
  write_weights(contents.tensors, out.path(), options);
  if (!options.tokenizer_from.empty()) carry_tokenizer(options.tokenizer_from, out.path());
  out.commit();
}

}  // namespace budwood::models
