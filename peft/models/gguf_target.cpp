#include <fmt/format.h>

#include <budwood/peft/merge/merge_target.h>
#include <budwood/peft/models/gguf_base.h>
#include <budwood/peft/models/gguf_config.h>
#include <budwood/peft/models/gguf_layout.h>
#include <budwood/peft/models/gguf_metadata.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <algorithm>
#include <optional>

namespace budwood::models {
namespace {

using io::GgmlType;
using quant::kernels::ggml_type_name;
using quant::kernels::ggml_type_traits;

constexpr int64_t kCopiedBytes = 1 << 20;

bool is_float(GgmlType type) {
  return type == GgmlType::f32 || type == GgmlType::f16 || type == GgmlType::bf16;
}

/// A tensor whose bytes are those of the model's file.
class CopiedItem final : public MergeItem {
 public:
  CopiedItem(const MergeOutput& output, const io::GgufTensor& tensor)
      : MergeItem(output), tensor_(tensor) {}
  int64_t pieces() const override {
    return (static_cast<int64_t>(tensor_.bytes) + kCopiedBytes - 1) / kCopiedBytes;
  }
  MergePiece make(int64_t piece) override {
    const auto begin = static_cast<uint64_t>(piece * kCopiedBytes);
    MergePiece made;
    made.bytes.resize(std::min<uint64_t>(kCopiedBytes, tensor_.bytes - begin));
    tensor_.read(begin, made.bytes.data(), made.bytes.size());
    return made;
  }

 private:
  const io::GgufTensor& tensor_;
};

/// A vector of the metadata.
class ValuesItem final : public MergeItem {
 public:
  ValuesItem(const MergeOutput& none, std::vector<float> values)
      : MergeItem(none), values_(std::move(values)) {}
  int64_t pieces() const override { return 1; }
  MergePiece make(int64_t) override {
    const auto* begin = reinterpret_cast<const std::byte*>(values_.data());
    return {{begin, begin + values_.size() * sizeof(float)}, {}};
  }
  bool counts() const override { return false; }

 private:
  std::vector<float> values_;
};

/// Rows in a type of ggml, those of heads in its rotary order.
class RowsItem final : public MergeItem {
 public:
  RowsItem(const MergePlan& plan, const MergeOutput& output, GgmlType type, int64_t head_dim)
      : MergeItem(output),
        rows_(plan, output, /*whole_rows=*/true),
        type_(type),
        head_dim_(head_dim) {
    if (head_dim_ > 0) rows_.align(head_dim_);
  }
  int64_t pieces() const override { return rows_.panels(); }
  void done() override { rows_.done(); }

  MergePiece make(int64_t piece) override {
    OutputRows::Values values;
    rows_.make(piece, values);
    const int64_t cols = rows_.cols();
    const auto rows = static_cast<int64_t>(values.after.size()) / cols;
    const int64_t width = quant::kernels::row_bytes(type_, cols);
    MergePiece made;
    made.bytes.resize(static_cast<size_t>(rows * width));
    std::vector<double> written(values.after.size());
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t to = head_dim_ > 0 ? row_in_gguf(r, head_dim_) : r;
      encode(values.after.data() + r * cols, made.bytes.data() + to * width,
             written.data() + r * cols);
    }
    add_sums(made, values, written);
    return made;
  }

 private:
  void encode(const double* values, std::byte* bytes, double* written) const {
    if (!encode_row(type_, values, rows_.cols(), bytes, written)) refuse();
  }
  [[noreturn]] void refuse() const {
    throw Error("merge_files", fmt::format("'{}' holds values that are not finite in {}; nothing "
                                           "was written",
                                           output().spec.name, ggml_type_name(type_)));
  }

  OutputRows rows_;
  GgmlType type_;
  int64_t head_dim_;
};

/// A vector, in F32.
class VectorItem final : public MergeItem {
 public:
  VectorItem(const MergePlan& plan, const MergeOutput& output, int64_t head_dim)
      : MergeItem(output), rows_(plan, output, /*whole_rows=*/true), head_dim_(head_dim) {}
  int64_t pieces() const override { return 1; }
  void done() override { rows_.done(); }

  MergePiece make(int64_t) override {
    OutputRows::Values values;
    std::vector<float> all;
    MergePiece made;
    for (int64_t panel = 0; panel < rows_.panels(); ++panel) {
      rows_.make(panel, values);
      const std::vector<float> rounded(values.after.begin(), values.after.end());
      add_sums(made, values, {rounded.begin(), rounded.end()});
      all.insert(all.end(), rounded.begin(), rounded.end());
    }
    made.bytes.resize(all.size() * sizeof(float));
    auto* to = reinterpret_cast<float*>(made.bytes.data());
    for (int64_t i = 0; i < static_cast<int64_t>(all.size()); ++i)
      to[head_dim_ > 0 ? row_in_gguf(i, head_dim_) : i] = all[static_cast<size_t>(i)];
    return made;
  }

 private:
  OutputRows rows_;
  int64_t head_dim_;
};

class GgufTarget final : public MergeTarget {
 public:
  GgufTarget(const MergePlan& plan, const MergeFilesOptions& options,
             const std::filesystem::path& path)
      : plan_(plan),
        options_(options),
        base_(dynamic_cast<const GgufBase*>(plan.base.get())),
        config_(base_ ? base_->model_config() : ModelConfig::from_json(plan.base->config())),
        described_(gguf_config(config_)) {
    warnings_ = described_.warnings;
    auto outputs = in_file_order();
    for (const auto& [name, output] : outputs) add(name, *output);
    if (!described_.rope_divisors.empty()) {
      specs_.push_back(
          {kRopeDivisors, GgmlType::f32, {static_cast<int64_t>(described_.rope_divisors.size())}});
      items_.push_back(std::make_unique<ValuesItem>(none_, described_.rope_divisors));
    }
    writer_.emplace(path, metadata(), specs_);
  }

  void write(size_t item, const std::vector<std::byte>& bytes) override {
    writer_->write(specs_[item].name, bytes.data(), bytes.size());
  }
  void commit() override { writer_->commit(); }
  std::vector<std::string> files() const override { return {options_.out.filename().string()}; }
  std::vector<std::string> warnings() const override { return warnings_; }
  uint64_t bytes() const override {
    uint64_t sum = 0;
    for (const auto& spec : specs_) sum += spec.bytes();
    return sum;
  }

 private:
  std::vector<std::pair<std::string, const MergeOutput*>> in_file_order() const {
    std::vector<std::pair<std::string, const MergeOutput*>> all;
    for (const auto& output : plan_.outputs) all.emplace_back(gguf_name(output.spec.name), &output);
    std::ranges::stable_sort(all, {}, [](const auto& one) { return gguf_place(one.first); });
    return all;
  }

  // The file's own tensor behind an output that nothing of an adapter replaces.
  const io::GgufTensor* stored(const MergeOutput& output) const {
    return base_ && output.whole == nullptr ? &base_->stored(*output.source) : nullptr;
  }

  GgmlType type_of(const std::string& name, const MergeOutput& output) const {
    const auto* own = stored(output);
    const bool table = name == "token_embd.weight" || name == "output.weight";
    if (options_.dtype == "float32") return GgmlType::f32;
    if (options_.dtype == "float16") return GgmlType::f16;
    if (options_.dtype == "bfloat16") return GgmlType::bf16;
    if (options_.dtype == "q8_0" || (table && options_.dtype.starts_with("q4")))
      return GgmlType::q8_0;
    if (options_.dtype == "q4_0") return GgmlType::q4_0;
    if (options_.dtype == "q4_1") return GgmlType::q4_1;
    if (own && (options_.into == "requantised" || !output.changed() || is_float(own->type)))
      return own->type;
    if (plan_.base->packed(*output.source)) return GgmlType::f16;
    return output.spec.dtype == io::Dtype::f32    ? GgmlType::f32
           : output.spec.dtype == io::Dtype::bf16 ? GgmlType::bf16
                                                  : GgmlType::f16;
  }

  void add(const std::string& name, const MergeOutput& output) {
    const int64_t head_dim =
        described_.architecture == "llama" && rotary_rows(output.spec.name) ? config_.head_dim : 0;
    const auto& shape = output.spec.shape;
    const auto* own = stored(output);
    if (shape.size() < 2) {
      specs_.push_back({name, GgmlType::f32, shape});
      items_.push_back(std::make_unique<VectorItem>(plan_, output, head_dim));
      return;
    }
    auto type = type_of(name, output);
    if (shape.back() % ggml_type_traits(type).block != 0) {
      warnings_.push_back(fmt::format("{} is F16: its rows of {} are no whole blocks of {}", name,
                                      shape.back(), ggml_type_name(type)));
      type = GgmlType::f16;
    }
    specs_.push_back({name, type, shape});
    ++types_[type];
    if (own && own->type == type && !output.changed()) {
      items_.push_back(std::make_unique<CopiedItem>(output, *own));
      return;
    }
    if (!ggml_type_traits(type).writable)
      throw Error("merge_files", fmt::format("{} is {}, which is not made anew: merge into "
                                             "dequantised weights",
                                             name, ggml_type_name(type)));
    items_.push_back(std::make_unique<RowsItem>(plan_, output, type, head_dim));
  }

  io::GgufMetadata metadata() {
    const auto most =
        std::ranges::max_element(types_, {}, [](const auto& type) { return type.second; });
    const auto type = most == types_.end() ? GgmlType::f32 : most->first;
    if (!base_) {
      const bool blocks = std::ranges::any_of(
          specs_, [](const auto& spec) { return ggml_type_traits(spec.type).block > 1; });
      return gguf_metadata(config_, described_,
                           {.type = type, .blocks = blocks, .tokenizer_from = tokenizer()},
                           warnings_);
    }
    auto keys = base_->file().metadata();
    for (auto& [key, value] : keys)
      if (key == "general.file_type" && ggml_type_traits(type).writable)
        value = gguf_file_type(type);
    return keys;
  }

  // The folder, when it has a tokeniser of any kind.
  std::string tokenizer() {
    const auto& path = plan_.base->path();
    for (const char* name : {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"})
      if (std::filesystem::exists(path / name)) return path.string();
    warnings_.push_back(path.string() + " has no tokeniser, and neither has the file");
    return {};
  }

  const MergePlan& plan_;
  const MergeFilesOptions& options_;
  const GgufBase* base_;
  ModelConfig config_;
  GgufConfig described_;
  const MergeOutput none_;
  std::vector<io::GgufTensorSpec> specs_;
  std::map<GgmlType, int64_t> types_;
  std::vector<std::string> warnings_;
  std::optional<io::GgufWriter> writer_;
};

const bool registered = register_merge_target(
    "gguf", [](const MergePlan& plan, const MergeFilesOptions& options, const MergePlace& place) {
      return std::make_unique<GgufTarget>(plan, options, place.path);
    });

}  // namespace
}  // namespace budwood::models
