#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <budwood/peft/io/text.h>
#include <budwood/peft/models/gguf_config.h>
#include <budwood/peft/models/gguf_layout.h>
#include <budwood/peft/models/gguf_metadata.h>
#include <budwood/peft/models/save_gguf.h>
#include <budwood/peft/models/stored_tensors.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <algorithm>
#include <atomic>
#include <filesystem>

namespace budwood::models {
namespace {

using io::GgmlType;
using quant::kernels::ggml_type_name;
using quant::kernels::ggml_type_traits;

// Bytes of float32 that are converted and written at a time.
constexpr int64_t kPanelBytes = 16 << 20;

[[noreturn]] void refuse(const std::string& fact) {
  throw Error("save_gguf", fact);
}

GgmlType type_of(const std::string& name, const char* option) {
  const auto type = quant::kernels::ggml_type_from_name(name);
  if (!type || !ggml_type_traits(*type).writable)
    refuse(fmt::format("{} is {}; wanted one of {}", option, io::in_quotes(name),
                       quant::kernels::writable_ggml_types()));
  return *type;
}

/// A tensor on its way into the file.
struct Output {
  io::GgufTensorSpec spec;
  StoredTensor source;
  int64_t head_dim = 0;  ///< rows are permuted inside heads of this size; 0 = not
  bool copied = false;
};

class Saver {
 public:
  Saver(CausalLM& model, const std::string& path, const SaveGgufOptions& options)
      : config_(model.config()),
        path_(path),
        options_(options),
        type_(type_of(options.type, "type")),
        embedding_type_(choose_embedding_type()),
        described_(gguf_config(config_)) {
    report_.warnings = described_.warnings;
    for (auto& [name, tensor] : stored_tensors(model, "save_gguf")) add(name, std::move(tensor));
    if (!described_.rope_divisors.empty())
      add_vector(kRopeDivisors, at::tensor(described_.rope_divisors, at::kFloat));
    std::ranges::stable_sort(outputs_, {}, [](const Output& o) { return gguf_place(o.spec.name); });
  }

  SaveGgufReport save() {
    std::vector<io::GgufTensorSpec> specs;
    for (const auto& output : outputs_) specs.push_back(output.spec);
    io::GgufWriter writer(path_, metadata(), specs);
    for (const auto& output : outputs_) {
      write(writer, output);
      const auto& spec = output.spec;
      report_.tensors.push_back({spec.name, std::string(ggml_type_name(spec.type)), spec.shape,
                                 spec.bytes(), output.copied});
    }
    writer.commit();
    return std::move(report_);
  }

 private:
  GgmlType choose_embedding_type() const {
    if (!options_.embedding_type.empty()) return type_of(options_.embedding_type, "embedding_type");
    return type_ == GgmlType::q4_0 || type_ == GgmlType::q4_1 ? GgmlType::q8_0 : type_;
  }

  void add_vector(const std::string& name, const at::Tensor& values) {
    outputs_.push_back({{name, GgmlType::f32, values.sizes().vec()}, {{}, values}, 0, false});
  }

  void add(const std::string& name, StoredTensor tensor) {
    const auto theirs = gguf_name(name);
    const bool permuted = described_.architecture == "llama" && rotary_rows(name);
    const int64_t head_dim = permuted ? config_.head_dim : 0;
    if (!tensor.matrix) {
      const auto& v = tensor.vector;
      return add_vector(theirs, permuted ? rows_to_gguf(v, head_dim) : v);
    }
    const bool embedding = theirs == "token_embd.weight" || theirs == "output.weight";
    auto type = embedding ? embedding_type_ : type_;
    const auto& traits = ggml_type_traits(type);
    if (tensor.matrix->in % traits.block != 0) {
      report_.warnings.push_back(
          fmt::format("{} is F16: its rows of {} are no whole blocks of {} ({} elements)", theirs,
                      tensor.matrix->in, traits.name, traits.block));
      type = GgmlType::f16;
    }
    const bool copied = tensor.matrix->packed() && tensor.matrix->format == gguf_format(type);
    outputs_.push_back({{theirs, type, tensor.shape()}, std::move(tensor), head_dim, copied});
  }

  io::GgufMetadata metadata() {
    const bool blocks = std::ranges::any_of(
        outputs_, [](const Output& o) { return ggml_type_traits(o.spec.type).block > 1; });
    return gguf_metadata(config_, described_,
                         {.name = options_.name,
                          .type = type_,
                          .blocks = blocks,
                          .tokenizer_from = options_.tokenizer_from},
                         report_.warnings);
  }

  void write(io::GgufWriter& writer, const Output& output) {
    const int64_t rows = output.source.row_count();
    const int64_t cols = output.spec.shape.empty() ? 1 : output.spec.shape.back();
    // Panels of permuted tensors are whole heads.
    const int64_t unit = std::max<int64_t>(1, output.head_dim);
    const int64_t row_bytes = std::max<int64_t>(1, cols * static_cast<int64_t>(sizeof(float)));
    const int64_t step = std::max(unit, kPanelBytes / row_bytes / unit * unit);
    for (int64_t begin = 0; begin < rows; begin += step) {
      const auto panel = bytes_of(output, begin, std::min(rows, begin + step), cols);
      writer.write(output.spec.name, panel.const_data_ptr(), panel.nbytes());
    }
  }

  static at::Tensor in_file_order(const Output& output, const at::Tensor& rows) {
    return (output.head_dim ? rows_to_gguf(rows, output.head_dim) : rows).contiguous();
  }

  at::Tensor bytes_of(const Output& output, int64_t begin, int64_t end, int64_t cols) const {
    if (output.copied) {
      const auto& blocks = output.source.matrix->parts[0];
      return in_file_order(
          output, blocks.view({output.source.matrix->out, -1}).narrow(0, begin, end - begin).cpu());
    }
    const auto values = in_file_order(output, output.source.rows(begin, end, at::kFloat));
    const auto type = output.spec.type;
    const int64_t width = quant::kernels::row_bytes(type, cols), count = values.size(0);
    auto result = at::empty({count, width}, at::kByte);
    const auto* from = values.const_data_ptr<float>();
    auto* to = result.mutable_data_ptr<uint8_t>();
    std::atomic<int64_t> bad_row{count};
    at::parallel_for(0, count, 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        if (!quant::kernels::quantize_row(type, from + r * cols, to + r * width, cols).ok()) {
          int64_t seen = bad_row;
          while (r < seen && !bad_row.compare_exchange_weak(seen, r)) {
          }
          return;
        }
    });
    if (const int64_t r = bad_row; r < count) {
      const auto status = quant::kernels::quantize_row(type, from + r * cols, to + r * width, cols);
      refuse(fmt::format("{}: element {} of row {} is {}, {}", output.spec.name, status.index,
                         begin + r, from[r * cols + status.index],
                         status.fault == quant::kernels::Fault::not_finite
                             ? "a finite number is wanted"
                             : fmt::format("too large for {}", ggml_type_name(type))));
    }
    return result;
  }

  const ModelConfig& config_;
  const std::string path_;
  const SaveGgufOptions& options_;
  GgmlType type_, embedding_type_;
  GgufConfig described_;
  std::vector<Output> outputs_;
  SaveGgufReport report_;
};

}  // namespace

std::map<std::string, int64_t> SaveGgufReport::types() const {
  std::map<std::string, int64_t> counts;
  for (const auto& tensor : tensors) ++counts[tensor.type];
  return counts;
}

SaveGgufReport save_gguf(CausalLM& model, const std::string& path, const SaveGgufOptions& options) {
  at::NoGradGuard no_grad;
  return Saver(model, path, options).save();
}

}  // namespace budwood::models
