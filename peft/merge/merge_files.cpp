#include <budwood/peft/io/text.h>
#include <budwood/peft/merge.h>
#include <budwood/peft/merge/ordered_run.h>
#include <budwood/peft/merge/output_rows.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

namespace budwood {
namespace {

namespace fs = std::filesystem;
constexpr uint64_t kLargestCarried = 256 << 20;

struct Piece {
  std::vector<std::byte> bytes;
  kernels::FoldSums sums;
};

Piece make_piece(OutputRows& output, int64_t panel) {
  if (output.is_copy()) return {output.copied(panel), {}};
  thread_local OutputRows::Values values;
  thread_local std::vector<double> written;
  output.make(panel, values);
  Piece piece{output.rounded(values.after, panel), {}};
  output.widen(piece.bytes, written);
  piece.sums = sums_of(values, written);
  return piece;
}

MergedTensor figures(const std::string& name, const kernels::FoldSums& sums) {
  MergedTensor merged{
      .name = name, .weight_norm = std::sqrt(sums.weight), .delta_norm = std::sqrt(sums.delta)};
  if (sums.delta > 0) {
    merged.survival = sums.left / sums.delta;
    merged.error = std::sqrt(sums.error / sums.delta);
  }
  return merged;
}

void write_weights(const MergePlan& plan, const MergeFilesOptions& options, const fs::path& folder,
                   MergeFilesReport& report) {
  std::vector<io::TensorSpec> specs;
  std::map<std::string, const MergeOutput*> by_name;
  for (const auto& output : plan.outputs) {
    specs.push_back(output.spec);
    by_name[output.spec.name] = &output;
    report.bytes += output.spec.bytes();
  }
  io::ShardedWriter writer(folder, specs, options.max_shard_size);
  std::vector<std::unique_ptr<OutputRows>> outputs;
  std::vector<std::pair<size_t, int64_t>> pieces;  // output, panel
  for (const auto& spec : writer.order()) {
    outputs.push_back(std::make_unique<OutputRows>(plan, *by_name.at(spec.name)));
    for (int64_t i = 0; i < outputs.back()->panels(); ++i)
      pieces.emplace_back(outputs.size() - 1, i);
  }
  kernels::FoldSums sums;
  const int jobs = options.jobs > 0
                       ? options.jobs
                       : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  run_in_order<Piece>(
      static_cast<int64_t>(pieces.size()), jobs,
      [&](int64_t i) {
        const auto& [output, panel] = pieces[static_cast<size_t>(i)];
        return make_piece(*outputs[output], panel);
      },
      [&](int64_t i, Piece piece) {
        const auto& [output, panel] = pieces[static_cast<size_t>(i)];
        const auto& spec = writer.order()[output];
        writer.write(spec.name, piece.bytes.data(), piece.bytes.size());
        sums.add(piece.sums);
        if (panel + 1 < outputs[output]->panels()) return;
        outputs[output]->done();
        const auto& planned = *by_name.at(spec.name);
        if (!planned.edits.empty()) report.merged.push_back(figures(spec.name, sums));
        if (planned.whole != nullptr) report.replaced.push_back(spec.name);
        sums = {};
      });
  writer.commit();
  report.files = writer.names();
}

// config.json with what the merge changed in it; otherwise byte for byte.
std::string new_config(const MergePlan& plan, const MergeFilesOptions& options) {
  if (!plan.unties && options.dtype == "auto") return plan.layout.config();
  auto json = nlohmann::ordered_json::parse(plan.layout.config());
  if (plan.unties) json["tie_word_embeddings"] = false;
  if (options.dtype != "auto")
    json[json.contains("torch_dtype") ? "torch_dtype" : "dtype"] = options.dtype;
  return json.dump(2) + "\n";
}

// Tokeniser, templates, code and licences.
void carry_others(const fs::path& from, const fs::path& folder) {
  for (const auto& entry : fs::directory_iterator(from)) {
    const auto name = entry.path().filename().string();
    const bool weights = name.ends_with(".safetensors") || name.ends_with(".bin") ||
                         name.ends_with(".gguf") || name.ends_with(".index.json") ||
                         name.ends_with(".pt") || name.ends_with(".pth") || name.ends_with(".h5") ||
                         name.ends_with(".msgpack");
    if (weights || name.starts_with('.') || name == "config.json" || name == "merge_report.json" ||
        fs::is_directory(entry.path()))
      continue;
    io::write_file(folder / name, io::read_file(io::file_in_folder(from, name), kLargestCarried));
  }
}

}  // namespace

std::optional<std::string> why_not_streamed(const MergeFilesOptions& options) {
  if (!fs::is_directory(options.model)) return options.model.string() + " is no folder";
  const auto config = options.model / "config.json";
  if (fs::exists(config)) {
    const auto json = nlohmann::json::parse(io::read_file(config), nullptr, false);
    if (json.is_object() && json.contains("quantization_config") &&
        !json["quantization_config"].is_null())
      return options.model.string() + " is quantised";
  }
  for (const auto& source : options.adapters) {
    const auto path = source.path / "adapter_config.json";
    if (!fs::exists(path)) continue;
    if (config_kind(io::read_file(path), path.string()) != ConfigKind::peft)
      return source.path.string() + " is not of HF PEFT's layout";
    if (!fs::exists(source.path / "adapter_model.safetensors"))
      return source.path.string() + " has no adapter_model.safetensors";
    const auto adapter = load_adapter_config(source.path);
    const auto* method = find_fold(adapter->peft_type);
    if (method == nullptr || !method->needs_model) continue;
    if (const auto why = method->needs_model(*adapter)) return source.path.string() + " is " + *why;
  }
  return {};
}

namespace {

// Overwriting is for what a merge made, never for what it reads.
void check_output(const MergeFilesOptions& options) {
  const auto out = fs::weakly_canonical(options.out);
  const auto check = [&](const fs::path& read) {
    const auto from = fs::weakly_canonical(read);
    if (std::mismatch(out.begin(), out.end(), from.begin(), from.end()).first == out.end())
      throw Error("merge_files", fmt::format("{} is, or holds, {}, which is read: choose another "
                                             "name",
                                             options.out.string(), read.string()));
  };
  check(options.model);
  for (const auto& source : options.adapters) check(source.path);
}

}  // namespace

MergeFilesReport merge_files(const MergeFilesOptions& options) {
  check_output(options);
  if (options.max_shard_size < 1)
    throw Error("merge_files", "max_shard_size is a positive number of bytes");
  if (const auto why = why_not_streamed(options))
    throw Error("merge_files", *why + ": it is merged with the model in memory");
  const MergePlan plan(options);
  MergeFilesReport report;
  report.warnings = plan.warnings;
  io::AtomicFolder out(options.out,
                       options.overwrite ? io::Existing::replace : io::Existing::refuse);
  write_weights(plan, options, out.path(), report);
  carry_others(options.model, out.path());
  if (!plan.layout.config().empty())
    io::write_file(out.path() / "config.json", new_config(plan, options));
  io::write_file(out.path() / "merge_report.json", report.to_json(options));
  out.commit();
  return report;
}

std::string MergeFilesReport::to_json(const MergeFilesOptions& options) const {
  nlohmann::ordered_json json;
  json["version"] = 1;
  json["model"] = options.model.string();
  json["adapters"] = nlohmann::ordered_json::array();
  for (const auto& source : options.adapters)
    json["adapters"].push_back({{"path", source.path.string()}, {"weight", source.weight}});
  json["dtype"] = options.dtype;
  json["merged"] = nlohmann::ordered_json::array();
  for (const auto& tensor : merged)
    json["merged"].push_back({{"name", tensor.name},
                              {"weight_norm", tensor.weight_norm},
                              {"delta_norm", tensor.delta_norm},
                              {"survival", tensor.survival},
                              {"error", tensor.error}});
  json["replaced"] = replaced;
  json["warnings"] = warnings;
  return json.dump(2) + "\n";
}

}  // namespace budwood
