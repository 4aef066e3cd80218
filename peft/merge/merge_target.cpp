#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/merge/merge_target.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <map>

namespace budwood {
namespace {

std::map<std::string, MergeTargetFactory>& factories() {
  static std::map<std::string, MergeTargetFactory> all;
  return all;
}

/// safetensors files of plain numbers.
class FolderTarget final : public MergeTarget {
 public:
  FolderTarget(const MergePlan& plan, const MergePlace& place)
      : writer_(place.path, specs_of(plan), place.max_shard_size, {{"format", "pt"}},
                place.present) {
    std::map<std::string, const MergeOutput*> by_name;
    for (const auto& output : plan.outputs) {
      by_name[output.spec.name] = &output;
      bytes_ += output.spec.bytes();
    }
    for (const auto& spec : writer_.order())
      items_.push_back(std::make_unique<PlainItem>(plan, *by_name.at(spec.name)));
  }

  void write(size_t item, const std::vector<std::byte>& bytes) override {
    writer_.write(writer_.order()[item].name, bytes.data(), bytes.size());
  }
  void commit() override { writer_.commit(); }
  std::vector<std::string> files() const override { return writer_.names(); }
  std::vector<std::string> finished() const override { return writer_.finished(); }
  uint64_t bytes() const override { return bytes_; }

 private:
  static std::vector<io::TensorSpec> specs_of(const MergePlan& plan) {
    std::vector<io::TensorSpec> specs;
    for (const auto& output : plan.outputs) specs.push_back(output.spec);
    return specs;
  }
  io::ShardedWriter writer_;
  uint64_t bytes_ = 0;
};

const bool registered = register_merge_target(
    "folder", [](const MergePlan& plan, const MergeFilesOptions&, const MergePlace& place) {
      return std::make_unique<FolderTarget>(plan, place);
    });

}  // namespace

MergePiece PlainItem::make(int64_t piece) {
  if (rows_.is_copy()) return {rows_.copied(piece), {}};
  MergePiece made;
  if (rows_.is_direct()) {
    made.bytes = rows_.make_rounded(piece, made.sums);
    return made;
  }
  thread_local OutputRows::Values values;
  rows_.make(piece, values);
  thread_local std::vector<double> written;
  made.bytes = rows_.rounded(values.after, piece);
  rows_.widen(made.bytes, written);
  add_sums(made, values, written);
  return made;
}

void add_sums(MergePiece& piece, const OutputRows::Values& values,
              const std::vector<double>& written) {
  piece.sums.add(sums_of(values, written));
  for (size_t i = 0; i < values.trained.size(); ++i) {
    const double away = written[i] - values.trained[i];
    piece.distance += away * away;
  }
}

bool register_merge_target(const std::string& kind, MergeTargetFactory factory) {
  return factories().emplace(kind, std::move(factory)).second;
}

std::unique_ptr<MergeTarget> open_merge_target(const std::string& kind, const MergePlan& plan,
                                               const MergeFilesOptions& options,
                                               const MergePlace& place) {
  const auto it = factories().find(kind);
  if (it == factories().end())
    throw Error("merge_files", fmt::format("this program cannot write files of kind '{}'", kind));
  return it->second(plan, options, place);
}

}  // namespace budwood
