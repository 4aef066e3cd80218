#include <budwood/peft/merge.h>
#include <budwood/peft/merge/backup.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>

namespace budwood {
namespace {

namespace fs = std::filesystem;
constexpr uint64_t kPiece = 1 << 20;

/// A tensor that is taken from where it is as it was.
struct Restored {
  io::TensorSpec spec;
  const MergeBase* from = nullptr;  ///< the merged model or the base
  const io::TensorInfo* tensor = nullptr;
};

void write(const std::vector<Restored>& all, const fs::path& folder, uint64_t max_shard_size) {
  std::vector<io::TensorSpec> specs;
  std::map<std::string, const Restored*> by_name;
  for (const auto& one : all) {
    specs.push_back(one.spec);
    by_name[one.spec.name] = &one;
  }
  io::ShardedWriter writer(folder, specs, max_shard_size);
  std::vector<std::byte> bytes;
  for (const auto& spec : writer.order()) {
    const auto& one = *by_name.at(spec.name);
    for (uint64_t at = 0; at < spec.bytes(); at += kPiece) {
      const auto count = std::min(kPiece, spec.bytes() - at);
      if (one.from == nullptr) {  // mapped
        writer.write(spec.name, one.tensor->data + at, count);
        continue;
      }
      bytes.resize(count);
      one.from->read(*one.tensor, at, bytes.data(), bytes.size());
      writer.write(spec.name, bytes.data(), bytes.size());
    }
  }
  writer.commit();
}

void finish(io::AtomicFolder& out, const MergeBase& merged, const std::string& config) {
  merged.carry_over(out.path());
  if (!config.empty()) io::write_file(out.path() / "config.json", config);
  out.commit();
}

io::AtomicFolder folder_of(const UnmergeFilesOptions& options) {
  return io::AtomicFolder(options.out,
                          options.overwrite ? io::Existing::replace : io::Existing::refuse);
}

UnmergeFilesReport from_backup(const UnmergeFilesOptions& options, const MergeBackup& backup) {
  const PlainBase merged(options.model);
  UnmergeFilesReport report{.from = "backup"};
  std::vector<Restored> all;
  for (const auto* tensor : merged.tensors()) {
    if (std::find(backup.added.begin(), backup.added.end(), tensor->name) != backup.added.end())
      continue;
    const auto* before = backup.tensors.find(tensor->name);
    const auto& source = before ? *before : *tensor;
    all.push_back({{source.name, source.dtype, source.shape}, before ? nullptr : &merged, &source});
    if (before) report.restored.push_back(source.name);
  }
  for (const auto& tensor : backup.tensors.tensors())
    if (merged.find(tensor.name) == nullptr)
      throw Error("unmerge_files",
                  fmt::format("{} is in the backup and not in the model", tensor.name));
  auto out = folder_of(options);
  write(all, out.path(), options.max_shard_size);
  finish(out, merged, backup.config);
  return report;
}

MergeFilesOptions as_merge(const UnmergeFilesOptions& options, const fs::path& model) {
  MergeFilesOptions merging;
  merging.model = model;
  merging.adapters = options.adapters;
  merging.out = options.out;
  return merging;
}

// What the adapters change is the base's, the rest the merged model's.
UnmergeFilesReport from_base(const UnmergeFilesOptions& options) {
  const PlainBase merged(options.model);
  const MergePlan plan(as_merge(options, options.base));
  UnmergeFilesReport report{.from = "base"};
  report.warnings = plan.warnings;
  std::vector<std::string> faults;
  std::vector<Restored> all;
  std::set<std::string> known;
  for (const auto& output : plan.outputs) {
    known.insert(output.spec.name);
    const auto* tensor = merged.find(output.spec.name);
    if (tensor == nullptr || tensor->shape != output.spec.shape) {
      faults.push_back(output.spec.name);
      continue;
    }
    if (output.spec.name != output.source->name) continue;  // a head that was untied
    const bool changed = output.changed() || tensor->dtype != output.source->dtype;
    const auto& source = changed ? *output.source : *tensor;
    all.push_back(
        {{source.name, source.dtype, source.shape}, changed ? plan.base.get() : &merged, &source});
    if (changed) report.restored.push_back(source.name);
  }
  for (const auto* tensor : merged.tensors())
    if (!known.contains(tensor->name)) faults.push_back(tensor->name);
  if (!faults.empty())
    throw Error("unmerge_files", fmt::format("{} is not {} with these adapters merged into it; "
                                             "these tensors differ: {}",
                                             options.model.string(), options.base.string(),
                                             fmt::join(faults, ", ")));
  auto out = folder_of(options);
  write(all, out.path(), options.max_shard_size);
  finish(out, merged, plan.base->config());
  return report;
}

UnmergeFilesReport by_subtraction(const UnmergeFilesOptions& options) {
  auto merging = as_merge(options, options.model);
  merging.max_shard_size = options.max_shard_size;
  merging.jobs = options.jobs;
  merging.overwrite = options.overwrite;
  merging.force = true;  // the merged model is not the adapter's base
  {
    auto checked = merging;
    for (auto& source : checked.adapters) source.weight = 1.0;
    const MergePlan plan(checked);
    std::vector<std::string> more;
    for (const auto& output : plan.outputs) {
      const bool additive = output.whole == nullptr && output.rows.empty() && output.additive;
      if (!additive) more.push_back(output.spec.name);
    }
    if (!more.empty())
      throw Error("unmerge_files",
                  fmt::format("these weights were not only added to, so nothing can be subtracted: "
                              "give the base, or merge with a backup: {}",
                              fmt::join(more, ", ")));
  }
  for (auto& source : merging.adapters) source.weight = -source.weight;
  const auto merged = merge_files(merging);
  fs::remove(options.out / "merge_report.json");
  UnmergeFilesReport report{.from = "subtracted", .warnings = {}};
  for (const auto& tensor : merged.merged) {
    report.restored.push_back(tensor.name);
    report.error = std::max(report.error, tensor.error);
  }
  return report;
}

}  // namespace

UnmergeFilesReport unmerge_files(const UnmergeFilesOptions& options) {
  if (options.max_shard_size < 1)
    throw Error("unmerge_files", "max_shard_size is a positive number of bytes");
  io::require_apart("unmerge_files", options.out, {options.model, options.base});
  if (options.base.empty())
    if (const auto backup = read_backup(options.model)) return from_backup(options, *backup);
  if (options.adapters.empty())
    throw Error("unmerge_files", fmt::format("{} has no backup: name the adapters that were merged",
                                             options.model.string()));
  return options.base.empty() ? by_subtraction(options) : from_base(options);
}

}  // namespace budwood
