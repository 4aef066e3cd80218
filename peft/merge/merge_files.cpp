#include <budwood/peft/io/text.h>
#include <budwood/peft/merge.h>
#include <budwood/peft/merge/backup.h>
#include <budwood/peft/merge/merge_progress.h>
#include <budwood/peft/merge/merge_target.h>
#include <budwood/peft/merge/ordered_run.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

namespace budwood {
namespace {

namespace fs = std::filesystem;
// The part of a change that is left, below which a merge warns, and below which it refuses.
constexpr double kWarnedSurvival = 0.9, kLeastSurvival = 0.5;

MergedTensor figures(const std::string& name, const MergePiece& whole, bool has_trained) {
  const auto& sums = whole.sums;
  MergedTensor merged{
      .name = name, .weight_norm = std::sqrt(sums.weight), .delta_norm = std::sqrt(sums.delta)};
  if (sums.delta > 0) {
    merged.survival = sums.left / sums.delta;
    merged.error = std::sqrt(sums.error / sums.delta);
    if (has_trained) merged.distance = std::sqrt(whole.distance / sums.delta);
  }
  return merged;
}

void write_weights(const MergePlan& plan, const MergeFilesOptions& options, MergeTarget& target,
                   MergeFilesReport& report, const std::function<void()>& after_item) {
  std::vector<std::pair<size_t, int64_t>> pieces;  // item, piece
  for (size_t item = 0; item < target.items().size(); ++item)
    for (int64_t i = 0; i < target.items()[item]->pieces(); ++i) pieces.emplace_back(item, i);
  MergePiece whole;
  const int jobs = options.jobs > 0
                       ? options.jobs
                       : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  run_in_order<MergePiece>(
      static_cast<int64_t>(pieces.size()), jobs,
      [&](int64_t i) {
        const auto& [item, piece] = pieces[static_cast<size_t>(i)];
        return target.items()[item]->make(piece);
      },
      [&](int64_t i, MergePiece piece) {
        const auto& [number, part] = pieces[static_cast<size_t>(i)];
        auto& item = *target.items()[number];
        target.write(number, piece.bytes);
        whole.sums.add(piece.sums);
        whole.distance += piece.distance;
        if (part + 1 < item.pieces()) return;
        item.done();
        const auto& output = item.output();
        if (!output.edits.empty() && item.counts())
          report.merged.push_back(figures(output.spec.name, whole, plan.trained != nullptr));
        if (output.whole != nullptr && item.counts()) report.replaced.push_back(output.spec.name);
        whole = {};
        after_item();
      });
  report.files = target.files();
  report.bytes = target.bytes();
}

void judge(const MergeFilesOptions& options, MergeFilesReport& report) {
  std::vector<std::string> lost;
  for (const auto& tensor : report.merged) {
    if (tensor.survival >= kWarnedSurvival) continue;
    const auto text =
        fmt::format("{}: {:.1f} % of the change survives", tensor.name, 100 * tensor.survival);
    report.warnings.push_back(text);
    if (tensor.survival < kLeastSurvival) lost.push_back(text);
  }
  if (lost.empty() || options.force) return;
  const size_t shown = std::min<size_t>(lost.size(), 8);
  const std::vector<std::string> first(lost.begin(), lost.begin() + static_cast<int64_t>(shown));
  throw Error("merge_files",
              fmt::format("rounding would undo more than half of the adapter in {} of {} weights, "
                          "and nothing was written:\n  {}{}\n{}, or force it",
                          lost.size(), report.merged.size(), fmt::join(first, "\n  "),
                          lost.size() > shown ? "\n  ..." : "",
                          options.into == "requantised" ? "Merge into dequantised weights"
                                                        : "Choose a dtype with more digits"));
}

// config.json with what the merge changed in it; otherwise byte for byte.
std::string new_config(const MergePlan& plan, const MergeFilesOptions& options,
                       const std::string& quantization) {
  const auto& text = plan.base->config();
  const auto before = quantization_of(text);
  if (!plan.unties && options.dtype == "auto" && before == quantization && plan.vocabulary == 0)
    return text;
  auto json = nlohmann::ordered_json::parse(text);
  if (plan.unties) json["tie_word_embeddings"] = false;
  if (plan.vocabulary > 0) json["vocab_size"] = plan.vocabulary;
  if (before != quantization) json.erase("quantization_config");
  if (before != quantization && !quantization.empty())
    json["quantization_config"] = nlohmann::ordered_json::parse(quantization);
  if (options.dtype != "auto")
    json[json.contains("torch_dtype") ? "torch_dtype" : "dtype"] = options.dtype;
  return json.dump(2) + "\n";
}

}  // namespace

std::optional<std::string> why_not_streamed(const MergeFilesOptions& options) {
  for (const auto& source : options.adapters) {
    if (fs::exists(source.path / "adapter_model.bin") && !is_peft_folder(source.path))
      return source.path.string() + " has no adapter_model.safetensors";
    if (!is_peft_folder(source.path)) continue;
    std::vector<std::string> parameters;
    const auto adapter = read_config_of_files(source.path, parameters);
    const auto* method = find_fold(adapter->peft_type);
    if (method == nullptr || !method->needs_model) continue;
    if (const auto why = method->needs_model(*adapter)) return source.path.string() + " is " + *why;
  }
  return {};
}

namespace {

// Overwriting is for what a merge made, never for what it reads.
void check_output(const MergeFilesOptions& options) {
  std::vector<fs::path> read = {options.model, options.original};
  for (const auto& source : options.adapters) read.push_back(source.path);
  io::require_apart("merge_files", options.out, read);
}

MergeFilesReport merge_into_folder(const MergeFilesOptions& options) {
  const MergePlan plan(options);
  MergeFilesReport report;
  report.warnings = plan.warnings;
  MergeProgress progress(options);
  if (options.resume) progress.find();
  io::AtomicFolder out(options.out,
                       options.overwrite ? io::Existing::replace : io::Existing::refuse);
  const auto present = progress.take_over(out.path(), report);
  plan.base->carry_over(out.path());
  const auto lost = plan.base->warnings();
  report.warnings.insert(report.warnings.end(), lost.begin(), lost.end());
  const auto target =
      open_merge_target(options.into == "requantised" ? "requantised" : "folder", plan, options,
                        {out.path(), options.max_shard_size, present});
  write_weights(plan, options, *target, report,
                [&] { progress.save(out.path(), target->finished(), report); });
  judge(options, report);
  target->commit();
  if (!plan.base->config().empty())
    io::write_file(out.path() / "config.json", new_config(plan, options, target->quantization()));
  if (options.backup) write_backup(plan, out.path());
  io::write_file(out.path() / "merge_report.json", report.to_json(options));
  progress.finish(out.path());
  out.commit();
  return report;
}

MergeFilesReport merge_into_file(const MergeFilesOptions& options) {
  if (options.backup) throw Error("merge_files", "a backup goes into a folder, not a GGUF file");
  if (fs::exists(options.out) && !options.overwrite)
    throw Error("merge_files", fmt::format("'{}' exists already", options.out.string()));
  const MergePlan plan(options);
  MergeFilesReport report;
  const auto target = open_merge_target("gguf", plan, options, {.path = options.out});
  report.warnings = plan.warnings;
  const auto more = target->warnings();
  report.warnings.insert(report.warnings.end(), more.begin(), more.end());
  write_weights(plan, options, *target, report, [] {});
  judge(options, report);
  target->commit();
  io::write_file(options.out.string() + ".merge_report.json", report.to_json(options));
  return report;
}

}  // namespace

MergeFilesReport merge_files(const MergeFilesOptions& options) {
  check_output(options);
  if (options.max_shard_size < 1)
    throw Error("merge_files", "max_shard_size is a positive number of bytes");
  if (const auto why = why_not_streamed(options))
    throw Error("merge_files", *why + ": it is merged with the model in memory");
  return options.out.extension() == ".gguf" ? merge_into_file(options) : merge_into_folder(options);
}

std::string MergeFilesReport::to_json(const MergeFilesOptions& options) const {
  nlohmann::ordered_json json;
  json["version"] = 1;
  json["model"] = options.model.string();
  json["adapters"] = nlohmann::ordered_json::array();
  for (const auto& source : options.adapters)
    json["adapters"].push_back({{"path", source.path.string()}, {"weight", source.weight}});
  json["into"] = options.into;
  if (!options.original.empty()) json["original"] = options.original.string();
  json["dtype"] = options.dtype;
  json["merged"] = nlohmann::ordered_json::array();
  for (const auto& tensor : merged) {
    json["merged"].push_back({{"name", tensor.name},
                              {"weight_norm", tensor.weight_norm},
                              {"delta_norm", tensor.delta_norm},
                              {"survival", tensor.survival},
                              {"error", tensor.error}});
    if (tensor.distance) json["merged"].back()["distance"] = *tensor.distance;
  }
  json["replaced"] = replaced;
  json["warnings"] = warnings;
  return json.dump(2) + "\n";
}

}  // namespace budwood
