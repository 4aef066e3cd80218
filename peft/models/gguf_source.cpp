#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/models/gguf_source.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <budwood/quant/kernels/half.h>
#include <atomic>
#include <bit>
#include <limits>

namespace budwood::models {
namespace {

// A block type's number in quant::Format is this plus its number in the file.
constexpr int64_t kFirstGgufFormat = 16;

RopeConfig read_rope(const io::GgufFile& file, const std::string& arch, int64_t context,
                     int64_t head_dim) {
  RopeConfig rope;
  rope.theta = file.get_f32(arch + ".rope.freq_base", 10000.0f);
  const auto dimensions =
      file.get_u32(arch + ".rope.dimension_count", static_cast<uint32_t>(head_dim));
  if (static_cast<int64_t>(dimensions) != head_dim)
    throw Error("gguf", fmt::format("rope over {} of {} dimensions of a head is not supported",
                                    dimensions, head_dim));
  const auto type = file.get_string(arch + ".rope.scaling.type", "none");
  if (type != "none") {
    if (type != "linear" && type != "yarn")
      throw Error(
          "gguf",
          fmt::format("rope scaling '{}' is not supported; supported: none, linear, yarn", type));
    rope.type = type;
    rope.factor = file.get_f32(arch + ".rope.scaling.factor");
    rope.original_max_position = file.get_u32(arch + ".rope.scaling.original_context_length",
                                              static_cast<uint32_t>(context));
  }
  if (const auto* divisors = file.find("rope_freqs.weight")) {
    if (divisors->type != io::GgmlType::f32 ||
        divisors->shape != std::vector<int64_t>{head_dim / 2})
      throw Error("gguf", fmt::format("rope_freqs.weight is F32 [{}]", head_dim / 2));
    rope.frequency_divisors.resize(static_cast<size_t>(head_dim / 2));
    std::memcpy(rope.frequency_divisors.data(), divisors->data, divisors->bytes);
  }
  return rope;
}

std::optional<int64_t> token_id(const io::GgufFile& file, const std::string& key) {
  const auto name = "tokenizer.ggml." + key;
  if (!file.has(name)) return {};
  return file.get_u32(name);
}

// Where a per-layer list is allowed, all layers must agree: the models here have one size.
int64_t size_of(const io::GgufFile& file, const std::string& key) {
  const auto* value = file.find_value(key);
  if (value && std::holds_alternative<io::GgufArray>(*value)) {
    const auto sizes = file.get_integers(key);
    for (const auto size : sizes)
      if (size != sizes.front())
        throw Error("gguf",
                    fmt::format("'{}' differs from layer to layer, which is not supported", key));
    if (!sizes.empty()) return sizes.front();
  }
  return file.get_u32(key);
}

ModelConfig read_gguf_config(const io::GgufFile& file) {
  const auto arch = file.get_string("general.architecture");
  ModelConfig c;
  c.model_type = arch;
  if (arch == "llama")
    c.architecture = "LlamaForCausalLM";
  else if (arch == "qwen2")
    c.architecture = "Qwen2ForCausalLM";
  else if (arch == "qwen3")
    c.architecture = "Qwen3ForCausalLM";
  else
    throw Error(
        "gguf",
        fmt::format("architecture '{}' is not supported; supported: llama, qwen2, qwen3", arch));
  if (file.has(arch + ".expert_count") && file.get_u32(arch + ".expert_count") > 0)
    throw Error("gguf", "mixtures of experts are not supported");
  const auto* table = file.find("token_embd.weight");
  if (!table || table->shape.size() != 2)
    throw Error("gguf", "the matrix 'token_embd.weight' is missing");
  c.vocab_size = table->shape[0];
  c.num_hidden_layers = file.get_u32(arch + ".block_count");
  c.max_position_embeddings = file.get_u32(arch + ".context_length");
  c.hidden_size = file.get_u32(arch + ".embedding_length");
  c.intermediate_size = size_of(file, arch + ".feed_forward_length");
  c.num_attention_heads = size_of(file, arch + ".attention.head_count");
  if (c.num_attention_heads < 1 || c.hidden_size < 1)
    throw Error("gguf", "a model has heads and a width");
  c.num_key_value_heads = file.has(arch + ".attention.head_count_kv")
                              ? size_of(file, arch + ".attention.head_count_kv")
                              : c.num_attention_heads;
  if (c.num_key_value_heads < 1 || c.num_attention_heads % c.num_key_value_heads != 0)
    throw Error("gguf", fmt::format("{} heads are not a multiple of {} key/value heads",
                                    c.num_attention_heads, c.num_key_value_heads));
  const auto key = arch + ".attention.key_length";
  c.head_dim = file.has(key) ? file.get_u32(key) : c.hidden_size / c.num_attention_heads;
  if (file.get_u32(arch + ".attention.value_length", static_cast<uint32_t>(c.head_dim)) !=
      c.head_dim)
    throw Error("gguf", "value heads of another size than key heads are not supported");
  if (c.head_dim < 2 || c.head_dim % 2 != 0)
    throw Error("gguf",
                fmt::format("a head has an even number of dimensions, found {}", c.head_dim));
  c.rms_norm_eps = file.get_f32(arch + ".attention.layer_norm_rms_epsilon");
  c.attention_bias = file.find("blk.0.attn_q.bias") != nullptr;
  c.attention_out_bias = file.find("blk.0.attn_output.bias") != nullptr;
  c.mlp_bias = file.find("blk.0.ffn_up.bias") != nullptr;
  c.qk_norm = arch == "qwen3";
  c.tie_word_embeddings = file.find("output.weight") == nullptr;
  c.rope = read_rope(file, arch, c.max_position_embeddings, c.head_dim);
  c.sliding_window.assign(static_cast<size_t>(c.num_hidden_layers), 0);
  c.bos_token_id = token_id(file, "bos_token_id");
  c.pad_token_id = token_id(file, "padding_token_id");
  if (const auto eos = token_id(file, "eos_token_id")) c.eos_token_id.push_back(*eos);
  return c;
}

// Calls use(row, values [cols]) for all rows, from several threads.
template <class Use>
void for_rows(const io::GgufTensor& tensor, const Use& use) {
  const auto type = static_cast<quant::kernels::GgmlType>(tensor.type);
  const int64_t rows = tensor.shape.size() > 1 ? tensor.shape[0] : 1, cols = tensor.shape.back();
  const int64_t bytes = quant::kernels::row_bytes(type, cols);
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> values(static_cast<size_t>(cols));
    for (int64_t r = begin; r < end; ++r) {
      quant::kernels::dequantize_row(type, tensor.data + r * bytes, values.data(), cols);
      use(r, values);
    }
  });
}

at::Tensor decode(const io::GgufTensor& tensor, at::ScalarType dtype) {
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf)
    return decode(tensor, at::kFloat).to(dtype);
  auto result = at::empty(tensor.shape, at::TensorOptions().dtype(dtype));
  const int64_t cols = tensor.shape.back();
  auto* base = static_cast<char*>(result.mutable_data_ptr());
  for_rows(tensor, [&](int64_t r, const std::vector<float>& values) {
    auto* row = base + r * cols * result.element_size();
    if (dtype == at::kBFloat16)
      quant::kernels::fp32_to_bf16(values.data(), reinterpret_cast<uint16_t*>(row), cols);
    else if (dtype == at::kHalf)
      quant::kernels::fp32_to_fp16(values.data(), reinterpret_cast<uint16_t*>(row), cols);
    else
      std::memcpy(row, values.data(), static_cast<size_t>(cols) * sizeof(float));
  });
  return result;
}

bool all_finite(const io::GgufTensor& tensor) {
  std::atomic<bool> finite{true};
  for_rows(tensor, [&](int64_t, const std::vector<float>& values) {
    uint32_t bad = 0;
    for (const float value : values)
      bad |= (std::bit_cast<uint32_t>(value) & 0x7f800000u) == 0x7f800000u;
    if (bad) finite = false;
  });
  return finite;
}

[[noreturn]] void refuse_not_finite(const io::GgufTensor& tensor, const std::string& path) {
  throw Error("load", fmt::format("{}: the tensor '{}' holds values that are not finite", path,
                                  tensor.name));
}

// The rows as they lie in the mapped file: floats where they are floats, else the bytes of blocks.
at::Tensor stored_rows(const io::GgufTensor& tensor) {
  auto type = at::kByte;
  if (tensor.type == io::GgmlType::f32) type = at::kFloat;
  if (tensor.type == io::GgmlType::f16) type = at::kHalf;
  if (tensor.type == io::GgmlType::bf16) type = at::kBFloat16;
  const auto width = static_cast<int64_t>(c10::elementSize(type));
  const std::vector<int64_t> shape = {tensor.shape[0],
                                      static_cast<int64_t>(tensor.bytes) / tensor.shape[0] / width};
  auto* data = const_cast<std::byte*>(tensor.data);  // the mapping is private: writes are copied
  auto view = at::from_blob(
      data, shape, [file = tensor.file](void*) {}, at::TensorOptions().dtype(type));
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(width) == 0 ? view
                                                                                : view.clone();
}

// Files of architecture "llama" rotate neighbours (2i, 2i + 1), transformers halves (i, i + d/2).
at::Tensor rotary_order(const at::Tensor& rows, int64_t heads) {
  const int64_t head_dim = rows.size(0) / heads, width = rows.numel() / rows.size(0);
  return rows.reshape({heads, head_dim / 2, 2, width}).transpose(1, 2).reshape(rows.sizes());
}

}  // namespace

GgufSource::GgufSource(const std::string& path, at::ScalarType dtype, bool packed)
    : file_(io::GgufFile::open(path)),
      config_(read_gguf_config(file_)),
      dtype_(dtype),
      packed_(packed) {
  used_.insert("rope_freqs.weight");
}

bool GgufSource::has(const std::string& name) const {
  return file_.find(gguf_name(name)) != nullptr;
}

const io::GgufTensor& GgufSource::find(const std::string& name, at::IntArrayRef shape) {
  const auto theirs = gguf_name(name);
  const auto* tensor = file_.find(theirs);
  if (!tensor)
    throw Error("load",
                fmt::format("{}: the tensor '{}' is missing", file_.path().string(), theirs));
  if (at::IntArrayRef(tensor->shape) != shape)
    throw Error("load", fmt::format("{}: the tensor '{}' has shape [{}], the metadata want [{}]",
                                    file_.path().string(), theirs, fmt::join(tensor->shape, ", "),
                                    fmt::join(shape.vec(), ", ")));
  io::require_decodable(tensor->type, tensor->name, file_.path().string());
  used_.insert(theirs);
  return *tensor;
}

at::Tensor GgufSource::in_rotary_order(const std::string& name, const at::Tensor& rows) const {
  if (config_.model_type != "llama") return rows;
  if (name.find(".q_proj.") != std::string::npos)
    return rotary_order(rows, config_.num_attention_heads);
  if (name.find(".k_proj.") != std::string::npos)
    return rotary_order(rows, config_.num_key_value_heads);
  return rows;
}

at::Tensor GgufSource::read(const std::string& name, at::IntArrayRef shape) {
  const auto& tensor = find(name, shape);
  const auto values = decode(tensor, dtype_);
  if (!values.isfinite().all().item<bool>()) refuse_not_finite(tensor, file_.path().string());
  return in_rotary_order(name, values);
}

quant::Weight GgufSource::matrix(const std::string& name, int64_t out, int64_t in) {
  if (!packed_) return quant::Weight::dense(read(name, {out, in}));
  const auto& tensor = find(name, {out, in});
  if (!all_finite(tensor)) refuse_not_finite(tensor, file_.path().string());
  const auto rows = in_rotary_order(name, stored_rows(tensor));
  if (rows.is_floating_point()) return quant::Weight::dense(rows);
  return quant::Weight::from_parts({rows}, kFirstGgufFormat + static_cast<int64_t>(tensor.type),
                                   out, in);
}

at::Tensor GgufSource::vector(const std::string& name, int64_t size) {
  return read(name, {size});
}

std::vector<std::string> GgufSource::unused() const {
  std::vector<std::string> names;
  for (const auto& tensor : file_.tensors())
    if (!used_.contains(tensor.name)) names.push_back(tensor.name);
  return names;
}

}  // namespace budwood::models
