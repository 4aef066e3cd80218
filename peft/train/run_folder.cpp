#include <budwood/peft/train/run_folder.h>

#include <budwood/peft/io/file.h>
#include <budwood/peft/train/trainer.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <sys/resource.h>

#include <fstream>
#include <nlohmann/json.hpp>

namespace budwood::train {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kMetrics = "metrics.jsonl";

void append_line(const fs::path& output, const json& line) {
  std::ofstream out(output / kMetrics, std::ios::app | std::ios::binary);
  const auto text = line.dump() + "\n";
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  if (!out.flush())
    throw Error("Trainer", fmt::format("cannot write to {}", (output / kMetrics).string()));
}

json as_json(int64_t step, const Evaluation& e) {
  return {{"step", step},
          {"eval_loss", e.loss},
          {"eval_loss_error", e.loss_error},
          {"eval_perplexity", e.perplexity},
          {"eval_perplexity_error", e.perplexity_error},
          {"eval_tokens", e.tokens},
          {"eval_sequences", e.sequences},
          {"eval_seconds", e.seconds}};
}

}  // namespace

void start_run_folder(const fs::path& output, bool overwrite) {
  const auto checkpoints = list_checkpoints(output);
  std::string found;
  for (const char* name : {"training.json", "adapter_config.json"})
    if (fs::exists(output / name)) found = name;
  if (!checkpoints.empty()) found = checkpoints.back().second.filename().string();
  if (!overwrite && !found.empty())
    throw Error("Trainer",
                fmt::format("{} holds an earlier run ({}): choose another folder, resume it "
                            "from a checkpoint, or set overwrite",
                            output.string(), found));
  for (const auto& [step, path] : checkpoints) remove_folder(path);
  if (fs::exists(output / "best")) remove_folder(output / "best");
  std::error_code ignored;
  for (const char* name : {kMetrics, "training.json"}) fs::remove(output / name, ignored);
}

void trim_metrics(const fs::path& output, int64_t step, int64_t evaluated_step) {
  const auto path = output / kMetrics;
  if (!fs::exists(path)) return;
  const auto text = io::read_file(path, uint64_t{1} << 34);
  std::string kept;
  for (size_t begin = 0; begin < text.size();) {
    const auto end = text.find('\n', begin);
    if (end == std::string::npos) break;
    const auto line = json::parse(text.begin() + static_cast<int64_t>(begin),
                                  text.begin() + static_cast<int64_t>(end), nullptr, false);
    if (line.is_object() && line.contains("step") && line["step"].is_number_integer() &&
        line["step"].get<int64_t>() <= (line.contains("eval_loss") ? evaluated_step : step))
      kept.append(text, begin, end + 1 - begin);
    begin = end + 1;
  }
  if (kept != text) io::write_file(path, kept);
}

void append_metrics(const fs::path& output, const StepMetrics& m) {
  append_line(output, {{"step", m.step},
                       {"epoch", m.epoch},
                       {"loss", m.loss},
                       {"learning_rate", m.learning_rate},
                       {"grad_norm", m.grad_norm},
                       {"tokens", m.tokens},
                       {"tokens_per_second", m.tokens_per_second},
                       {"seconds", m.seconds},
                       {"eta_seconds", m.eta_seconds},
                       {"peak_rss_mb", m.peak_rss_mb}});
}

void append_metrics(const fs::path& output, int64_t step, const Evaluation& evaluation) {
  append_line(output, as_json(step, evaluation));
}

std::string evaluation_json(int64_t step, const Evaluation& evaluation) {
  return as_json(step, evaluation).dump(2) + "\n";
}

double peak_rss_mb() {
  // Not ru_maxrss, in which the memory of the program that started this one counts.
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) return std::stod(line.substr(6)) / 1024.0;
  struct rusage usage = {};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024.0;
}

}  // namespace budwood::train
