#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/fold.h>
#include <budwood/peft/merge/merge_target.h>
#include <budwood/peft/models/packed_base.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/checkpoints/bitsandbytes.h>
#include <budwood/quant/checkpoints/integers.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cstring>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>

namespace budwood::models {
namespace {

// Spaces at the end of settings in JSON: room for an offset of other digits.
constexpr int64_t kRoom = 32;
constexpr std::string_view kState = "weight.quant_state.";
constexpr std::string_view kOrder = "weight.column_order";

std::vector<std::byte> bytes_of(const at::Tensor& tensor, uint64_t wanted, const char fill) {
  const auto whole = tensor.contiguous();
  std::vector<std::byte> bytes(wanted, static_cast<std::byte>(fill));
  if (whole.nbytes() > wanted)
    throw Error("merge_files", fmt::format("a part of a matrix takes {} bytes, {} are planned",
                                           whole.nbytes(), wanted));
  std::memcpy(bytes.data(), whole.const_data_ptr(), whole.nbytes());
  return bytes;
}

/// How the new codes come about.
enum class Packing {
  rounded,  ///< from the changed numbers
  moved,    ///< the old ones, with other zero points or scales
  kept,     ///< the old ones, in our own layout
};

/// A packed matrix that is changed and packed again.
class Repacked {
 public:
  Repacked(const MergePlan& plan, const MergeOutput& output, const PackedBase& base,
           Packing packing)
      : plan_(plan), output_(output), base_(base), source_(*output.source), packing_(packing) {}

  // All parts. The codes are not kept: they are written long after the scales, when those of all
  // other matrices would be kept too.
  at::Tensor part(const std::string& name, MergePiece* piece) {
    const std::lock_guard lock(mutex_);
    if (const auto it = small_.find(name); it != small_.end()) return it->second;
    auto parts = make(piece);
    for (auto& [other, tensor] : parts)
      if (other != "weight" && other != "weight.codes") small_[other] = tensor.clone();
    return parts.at(name);
  }

 private:
  quant::StoredParts make(MergePiece* piece) {
    const at::NoGradGuard no_grad;
    OutputRows rows(plan_, output_);
    auto made = base_.weight(source_);
    if (packing_ == Packing::rounded) made = rounded(rows, made);
    if (packing_ == Packing::moved && output_.rescaled)
      made = base_.rescaled(source_, output_.edits[0].term(source_.shape), output_.edits[0].weight);
    else if (packing_ == Packing::moved)
      made = quant::with_moved_zeros(made, group_change(made));
    if (piece != nullptr && packing_ != Packing::kept) measure(rows, made, *piece);
    if (made.format == quant::Format::affine4 || made.format == quant::Format::affine8)
      return quant::integer_parts(made);
    return quant::bnb_parts(made, dtype());
  }

  quant::Weight rounded(OutputRows& rows, const quant::Weight& like) const {
    OutputRows::Values values;
    auto matrix = at::empty(source_.shape, at::TensorOptions().dtype(at::kFloat));
    auto* to = matrix.mutable_data_ptr<float>();
    for (int64_t panel = 0; panel < rows.panels(); ++panel) {
      rows.make(panel, values);
      to = std::copy(values.after.begin(), values.after.end(), to);
    }
    return quant::requantize(matrix, like);
  }

  // The change of the edits, which is constant in each group of w: [out, groups].
  at::Tensor group_change(const quant::Weight& w) const {
    const int64_t size = w.parts[3].item<int64_t>();
    auto change = at::zeros(w.parts[1].sizes(), at::TensorOptions().dtype(at::kDouble));
    for (const auto& edit : output_.edits) {
      const auto term = edit.term(source_.shape);
      if (term.group % size != 0)
        throw Error("merge_files",
                    fmt::format("{}: QA-LoRA's groups of {} are not made of whole groups of {} of "
                                "the base: merge into dequantised weights",
                                source_.name, term.group, size));
      const auto first = at::arange(0, w.in, size, at::TensorOptions().dtype(at::kLong));
      change += edit.weight * term.scaling * wide(term.b).mm(wide(term.a).index_select(1, first));
    }
    return change;
  }

  static void measure(OutputRows& rows, const quant::Weight& made, MergePiece& piece) {
    OutputRows::Values values;
    int64_t begin = 0;
    for (int64_t panel = 0; panel < rows.panels(); ++panel) {
      rows.make(panel, values);
      const auto count = static_cast<int64_t>(values.after.size()) / rows.cols();
      const auto back = made.rows(begin, begin + count, at::kFloat).contiguous();
      const auto* first = back.const_data_ptr<float>();
      add_sums(piece, values, {first, first + back.numel()});
      begin += count;
    }
  }

  // What bitsandbytes decodes to, as the settings say.
  at::ScalarType dtype() const {
    for (const auto* info : base_.layer(source_).parts) {
      const auto name = info->name.substr(base_.layer(source_).path.size());
      if (!name.starts_with(kState)) continue;
      std::string text(info->bytes(), ' ');
      base_.read(*info, 0, text.data(), text.size());
      return scalar_type_of(nlohmann::json::parse(text).value("dtype", "float32"));
    }
    return at::kFloat;
  }

  const MergePlan& plan_;
  const MergeOutput& output_;
  const PackedBase& base_;
  const io::TensorInfo& source_;
  Packing packing_;
  std::mutex mutex_;
  std::map<std::string, at::Tensor> small_;
};

class RepackedItem final : public MergeItem {
 public:
  RepackedItem(std::shared_ptr<Repacked> matrix, const MergeOutput& output, std::string part,
               uint64_t bytes)
      : MergeItem(output), matrix_(std::move(matrix)), part_(std::move(part)), bytes_(bytes) {}
  int64_t pieces() const override { return 1; }
  bool counts() const override { return part_ == "weight" || part_ == "weight.codes"; }
  MergePiece make(int64_t /*piece*/) override {
    MergePiece piece;
    const auto tensor = matrix_->part(part_, counts() ? &piece : nullptr);
    piece.bytes = bytes_of(tensor, bytes_, part_.starts_with(kState) ? ' ' : 0);
    return piece;
  }

 private:
  std::shared_ptr<Repacked> matrix_;
  std::string part_;
  uint64_t bytes_;
};

/// A part as it is.
class PartItem final : public MergeItem {
 public:
  PartItem(const MergeOutput& output, const PackedBase& base, const io::TensorInfo& part)
      : MergeItem(output), base_(base), part_(part) {}
  int64_t pieces() const override {
    return std::max<int64_t>(1, (static_cast<int64_t>(part_.bytes()) + kStep - 1) / kStep);
  }
  bool counts() const override { return false; }
  MergePiece make(int64_t piece) override {
    const uint64_t begin = static_cast<uint64_t>(piece) * kStep;
    MergePiece made;
    made.bytes.resize(std::min<uint64_t>(kStep, part_.bytes() - begin));
    base_.read(part_, begin, made.bytes.data(), made.bytes.size());
    return made;
  }

 private:
  static constexpr int64_t kStep = 1 << 20;
  const PackedBase& base_;
  const io::TensorInfo& part_;
};

const PackedBase& packed_base(const MergePlan& plan) {
  const auto* base = dynamic_cast<const PackedBase*>(plan.base.get());
  if (base == nullptr)
    throw Error("merge_files", plan.base->path().string() +
                                   " is no quantised folder: there are no codes to be made anew");
  return *base;
}

// Whether an output's changes are constant in groups, as QA-LoRA's are, or scales, as PEQA's.
bool moves_exactly(const MergeOutput& output) {
  return output.whole == nullptr && output.rows.empty() && (output.rescaled || output.grouped);
}

class RequantisedTarget final : public MergeTarget {
 public:
  RequantisedTarget(const MergePlan& plan, const MergePlace& place) : base_(packed_base(plan)) {
    for (const auto& output : plan.outputs) add(plan, output);
    writer_.emplace(place.path, specs_, place.max_shard_size, io::Metadata{{"format", "pt"}},
                    place.present);
    for (const auto& spec : writer_->order()) items_.push_back(std::move(by_name_.at(spec.name)));
  }

  void write(size_t item, const std::vector<std::byte>& bytes) override {
    writer_->write(writer_->order()[item].name, bytes.data(), bytes.size());
  }
  void commit() override { writer_->commit(); }
  std::vector<std::string> files() const override { return writer_->names(); }
  std::vector<std::string> finished() const override { return writer_->finished(); }
  std::string quantization() const override {
    return bits_ == 0 ? quantization_of(base_.config()) : quant::integer_settings(bits_, plain_);
  }
  uint64_t bytes() const override {
    uint64_t sum = 0;
    for (const auto& spec : specs_) sum += spec.bytes();
    return sum;
  }

 private:
  void add(io::TensorSpec spec, std::unique_ptr<MergeItem> item) {
    by_name_[spec.name] = std::move(item);
    specs_.push_back(std::move(spec));
  }

  void add(const MergePlan& plan, const MergeOutput& output) {
    const bool stays_packed = output.whole == nullptr && base_.packed(*output.source) &&
                              output.spec.name == output.source->name;
    if (!stays_packed) {
      if (output.spec.shape.size() == 2 && output.spec.name.ends_with(".weight"))
        plain_.push_back(output.spec.name.substr(0, output.spec.name.size() - 7));
      return add(output.spec, std::make_unique<PlainItem>(plan, output));
    }
    const auto& layer = base_.layer(*output.source);
    const bool affine = base_.method() != "bitsandbytes";
    const bool foreign = affine && base_.method() != "budwood";
    const bool grouped = affine && moves_exactly(output);
    if (foreign && output.changed() && !grouped)
      throw Error("merge_files",
                  fmt::format("{} is of {}, whose codes need calibration data to be made: merge "
                              "into dequantised weights",
                              base_.path().string(), base_.method()));
    if (foreign) return add_integers(plan, output, layer, grouped ? Packing::moved : Packing::kept);
    if (!output.changed()) {
      for (const auto* part : layer.parts)
        add({part->name, part->dtype, part->shape},
            std::make_unique<PartItem>(output, base_, *part));
      return;
    }
    auto matrix = std::make_shared<Repacked>(plan, output, base_,
                                             grouped ? Packing::moved : Packing::rounded);
    for (const auto* info : layer.parts) {
      const auto part = info->name.substr(layer.path.size());
      if (part == kOrder && !output.rescaled) continue;
      io::TensorSpec spec{info->name, info->dtype, info->shape};
      if (part.starts_with(kState)) spec.shape = {info->shape[0] + kRoom};
      if (part == "weight.zeros") spec.dtype = zeros_dtype(output, info->dtype, grouped);
      add_part(output, matrix, part, std::move(spec));
    }
  }

  // A layer of another project's layout in our own, which has room for fractions as zero points.
  void add_integers(const MergePlan& plan, const MergeOutput& output,
                    const PackedBase::Layer& layer, Packing packing) {
    const auto weight = base_.weight(*output.source);
    bits_ = weight.format == quant::Format::affine4 ? 4 : 8;
    auto matrix = std::make_shared<Repacked>(plan, output, base_, packing);
    for (const auto& [part, tensor] : quant::integer_parts(weight)) {
      io::TensorSpec spec{layer.path + part, stored_dtype(tensor.scalar_type()),
                          tensor.sizes().vec()};
      if (part == "weight.zeros" && packing == Packing::moved)
        spec.dtype = zeros_dtype(output, spec.dtype, true);
      add_part(output, matrix, part, std::move(spec));
    }
  }

  // Of rounded codes integers; fractions where they are moved, and as they are under other scales.
  static io::Dtype zeros_dtype(const MergeOutput& output, io::Dtype own, bool grouped) {
    if (!grouped) return io::Dtype::u8;
    const bool as_they_are = output.rescaled && !output.new_zeros;
    return as_they_are ? own : io::Dtype::f32;
  }

  void add_part(const MergeOutput& output, const std::shared_ptr<Repacked>& matrix,
                const std::string& part, io::TensorSpec spec) {
    const auto bytes = spec.bytes();
    add(std::move(spec), std::make_unique<RepackedItem>(matrix, output, part, bytes));
  }

  const PackedBase& base_;
  int bits_ = 0;  // of a folder that is not of the base's layout
  std::vector<std::string> plain_;
  std::vector<io::TensorSpec> specs_;
  std::map<std::string, std::unique_ptr<MergeItem>> by_name_;
  std::optional<io::ShardedWriter> writer_;
};

const bool registered = register_merge_target(
    "requantised", [](const MergePlan& plan, const MergeFilesOptions&, const MergePlace& place) {
      return std::make_unique<RequantisedTarget>(plan, place);
    });

}  // namespace
}  // namespace budwood::models
