#include <budwood/peft/io/file.h>
#include <budwood/peft/io/staging.h>
#include <budwood/peft/merge/merge_progress.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace budwood {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
constexpr const char* kNotes = "merge_progress.json";

// Names, sizes and times of all files at a path.
Json state_of(const fs::path& path) {
  Json state = {{"path", fs::weakly_canonical(path).string()}};
  std::vector<fs::path> files;
  if (fs::is_directory(path)) {
    for (const auto& entry : fs::directory_iterator(path))
      if (entry.is_regular_file()) files.push_back(entry.path());
  } else if (fs::exists(path)) {
    files.push_back(path);
  }
  std::sort(files.begin(), files.end());
  for (const auto& file : files)
    state["files"].push_back({file.filename().string(), fs::file_size(file),
                              fs::last_write_time(file).time_since_epoch().count()});
  return state;
}

std::string inputs_of(const MergeFilesOptions& options) {
  Json inputs = {{"version", 1},
                 {"into", options.into},
                 {"dtype", options.dtype},
                 {"shard", options.max_shard_size},
                 {"model", state_of(options.model)}};
  if (!options.original.empty()) inputs["original"] = state_of(options.original);
  for (const auto& source : options.adapters)
    inputs["adapters"].push_back({state_of(source.path), source.weight});
  return inputs.dump();
}

}  // namespace

MergeProgress::MergeProgress(const MergeFilesOptions& options)
    : options_(options), inputs_(inputs_of(options)) {}

void MergeProgress::find() {
  auto target = fs::absolute(options_.out);
  if (!target.has_filename()) target = target.parent_path();
  aside_ = target.parent_path() / fmt::format(".{}.resumed", target.filename().string());
  std::error_code ignored;
  if (!fs::exists(aside_)) io::take_stale_folder(target, kNotes, aside_);
}

std::vector<std::string> MergeProgress::take_over(const fs::path& folder,
                                                  MergeFilesReport& report) {
  std::vector<std::string> taken;
  if (aside_.empty() || !fs::exists(aside_)) return taken;
  const auto notes = fs::exists(aside_ / kNotes)
                         ? Json::parse(io::read_file(aside_ / kNotes), nullptr, false)
                         : Json();
  if (notes.is_object() && notes.value("inputs", "") == inputs_) {
    for (const auto& name : notes["files"]) {
      taken.push_back(name.get<std::string>());
      fs::rename(aside_ / taken.back(), folder / taken.back());
    }
    for (const auto& one : notes["merged"]) {
      MergedTensor tensor{.name = one[0], .weight_norm = one[1], .delta_norm = one[2]};
      tensor.survival = one[3];
      tensor.error = one[4];
      if (!one[5].is_null()) tensor.distance = one[5].get<double>();
      report.merged.push_back(std::move(tensor));
    }
    report.replaced = notes["replaced"].get<std::vector<std::string>>();
    save(folder, taken, report);
  }
  fs::remove_all(aside_);
  return taken;
}

void MergeProgress::save(const fs::path& folder, const std::vector<std::string>& files,
                         const MergeFilesReport& report) {
  if (files.size() == saved_) return;
  saved_ = files.size();
  Json notes = {{"inputs", inputs_}, {"files", files}, {"merged", Json::array()}};
  for (const auto& tensor : report.merged)
    notes["merged"].push_back({tensor.name, tensor.weight_norm, tensor.delta_norm, tensor.survival,
                               tensor.error, tensor.distance ? Json(*tensor.distance) : Json()});
  notes["replaced"] = report.replaced;
  io::write_file(folder / kNotes, notes.dump());
}

void MergeProgress::finish(const fs::path& folder) {
  fs::remove(folder / kNotes);
}

}  // namespace budwood
