#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/convert.h>
#include <budwood/peft/inject.h>
#include <budwood/peft/models/compare_logits.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "verbs.h"

namespace {

using budwood::MergeFilesOptions;

struct Adapters {
  std::vector<std::string> paths;
  std::vector<double> weights;
};

void add_adapters(CLI::App& verb, Adapters& adapters) {
  verb.add_option("--adapter", adapters.paths, "Adapter folder; may be given several times")
      ->required();
  verb.add_option("--weight", adapters.weights, "Weight of each adapter, in their order");
}

// Adapters that need the base to be understood.
void merge_in_memory(const MergeFilesOptions& options, const Adapters& adapters) {
  if (options.into != "dequantised" || options.out.extension() == ".gguf")
    throw budwood::Error("merge", "with the model in memory, a folder of plain weights is written");
  std::vector<std::string> warnings, names;
  auto model = budwood::models::load_adapted(options.model, options.adapters, {}, warnings);
  print_warnings(warnings);
  for (size_t i = 0; i < options.adapters.size(); ++i) names.push_back(fmt::format("adapter{}", i));
  budwood::merge(*model, names);
  budwood::models::save(*model, options.out,
                        {.dtype = options.dtype,
                         .max_shard_size = static_cast<int64_t>(options.max_shard_size),
                         .overwrite = options.overwrite,
                         .tokenizer_from = options.model});
  std::cout << fmt::format("merged {} into {}\n", fmt::join(adapters.paths, ", "),
                           options.out.string());
}

void print_merged(const budwood::MergeFilesReport& report, const MergeFilesOptions& options) {
  print_warnings(report.warnings);
  std::cout << fmt::format(
      "{} weights changed, {} replaced; {:.1f} MB in {}{}\n", report.merged.size(),
      report.replaced.size(), static_cast<double>(report.bytes) / 1e6,
      report.files.size() == 1 ? "" : fmt::format("{} files of ", report.files.size()),
      options.out.string());
  if (report.merged.empty()) return;
  const auto& tensors = report.merged;
  const auto worst = std::ranges::max_element(tensors, {}, &budwood::MergedTensor::error);
  const auto least = std::ranges::min_element(tensors, {}, &budwood::MergedTensor::survival);
  std::cout << fmt::format("rounding added up to {:.3g} % of a change ({})\n", 100 * worst->error,
                           worst->name);
  std::cout << fmt::format("at least {:.2f} % of each change survives ({})\n",
                           100 * least->survival, least->name);
  if (!tensors[0].distance) return;
  const auto far = std::ranges::max_element(tensors, {}, &budwood::MergedTensor::distance);
  std::cout << fmt::format(
      "what was trained is up to {:.3g} changes away ({}): the quantiser's "
      "error is undone\n",
      *far->distance, far->name);
}

void run_merge(MergeFilesOptions& options, const Adapters& adapters, bool json) {
  options.adapters = merge_sources(adapters.paths, adapters.weights);
  if (const auto why = budwood::why_not_streamed(options)) {
    std::cerr << fmt::format("{}: merging with the model in memory\n", *why);
    return merge_in_memory(options, adapters);
  }
  const auto report = budwood::merge_files(options);
  if (json) {
    print_warnings(report.warnings);
    std::cout << report.to_json(options);
  } else {
    print_merged(report, options);
  }
}

struct VerifyState {
  MergeFilesOptions options;
  Adapters adapters;
  double tolerance = 1.0, logits_tolerance = 0.02;
  int64_t random_tokens = 16;
  std::vector<int64_t> tokens;
  bool json = false;
};

// Nothing when the models cannot be run here.
std::optional<budwood::models::LogitsComparison> logits_of(const VerifyState& state) {
  if (state.tokens.empty() && state.random_tokens <= 0) return {};
  try {
    return budwood::models::compare_logits(state.options.model, state.options.adapters,
                                           state.options.out, state.tokens, state.random_tokens);
  } catch (const budwood::Error& error) {
    if (!state.tokens.empty()) throw;
    print_warnings({fmt::format("logits are not compared: {}", error.what())});
    return {};
  }
}

bool run_verify(VerifyState& state) {
  auto& options = state.options;
  options.adapters = merge_sources(state.adapters.paths, state.adapters.weights);
  const auto report = budwood::verify_files(options);
  bool passed = report.passed(state.tolerance);
  const auto logits = logits_of(state);
  if (state.json) {
    auto json = nlohmann::ordered_json::parse(report.to_json(state.tolerance));
    if (logits)
      json["logits"] = {{"tokens", logits->tokens},
                        {"difference", logits->difference},
                        {"relative", logits->relative()},
                        {"agreement", logits->agreement},
                        {"tolerance", state.logits_tolerance}};
    std::cout << json.dump(2) << "\n";
  } else {
    for (const auto& fault : report.faults) std::cout << fault << "\n";
    for (const auto& tensor : report.tensors)
      if (!tensor.equal)
        std::cout << fmt::format("  {:<48} {:>8.3g} steps  survival {:.4f}  error {:.3g} %\n",
                                 tensor.name, tensor.steps, tensor.survival, 100 * tensor.error);
    std::cout << fmt::format("{} tensors compared: {} within {} steps\n", report.tensors.size(),
                             passed ? "all" : "not all", state.tolerance);
    if (logits)
      std::cout << fmt::format(
          "logits of {} tokens: {:.3g} apart, {:.3g} of the largest ({} is "
          "allowed); the same best token at {:.1f} %\n",
          logits->tokens, logits->difference, logits->relative(), state.logits_tolerance,
          100 * logits->agreement);
  }
  if (logits) passed &= logits->relative() <= state.logits_tolerance;
  return passed;
}

void add_merge(CLI::App& app) {
  struct State {
    MergeFilesOptions options;
    Adapters adapters;
    bool json = false;
  };
  const auto state = std::make_shared<State>();
  auto& options = state->options;
  auto* verb = app.add_subcommand("merge", "Fold adapters into their model");
  verb->add_option("--model", options.model,
                   "Hugging Face folder (plain, bitsandbytes, GPTQ, AWQ) or GGUF file")
      ->required();
  add_adapters(*verb, state->adapters);
  verb->add_option("--out", options.out, "Folder or file named *.gguf to write")->required();
  verb->add_option("--into", options.into,
                   "What becomes of a quantised model: dequantised, requantised, original16")
      ->capture_default_str();
  verb->add_option("--original", options.original, "The plain model's folder, for original16");
  verb->add_option("--dtype", options.dtype,
                   "auto, float32, bfloat16, float16; in a GGUF also q8_0, q4_0, q4_1")
      ->capture_default_str();
  verb->add_option("--max-shard-size", options.max_shard_size, "Bytes of one file")
      ->capture_default_str();
  verb->add_option("--jobs", options.jobs, "Threads; 0 = one for each processor")
      ->capture_default_str();
  verb->add_flag("--overwrite", options.overwrite, "Replace the output");
  verb->add_flag("--force", options.force,
                 "Merge into another base, and write what loses most of the change");
  verb->add_flag("--resume", options.resume, "Go on where a killed merge stopped");
  verb->add_flag("--backup", options.backup, "Keep the old weights in the folder, for unmerge");
  verb->add_flag("--json", state->json, "Print the report as JSON");
  verb->callback([state] { run_merge(state->options, state->adapters, state->json); });
}

void add_verify(CLI::App& app) {
  const auto state = std::make_shared<VerifyState>();
  auto* verb =
      app.add_subcommand("verify", "Compare a merged model with what model and adapters make");
  verb->add_option("--model", state->options.model, "Hugging Face folder or GGUF file")->required();
  add_adapters(*verb, state->adapters);
  verb->add_option("--merged", state->options.out, "The merged model's folder")->required();
  verb->add_option("--tolerance", state->tolerance,
                   "Allowed distance from the exact value, in steps of the dtype")
      ->capture_default_str();
  verb->add_option("--random-tokens", state->random_tokens,
                   "Tokens whose logits are compared; 0 = none")
      ->capture_default_str();
  verb->add_option("--tokens", state->tokens, "Or: ids of these")->delimiter(',');
  verb->add_option("--logits-tolerance", state->logits_tolerance,
                   "Allowed difference of logits, over the largest logit")
      ->capture_default_str();
  verb->add_flag("--json", state->json, "Print JSON");
  verb->callback([state] {
    if (!run_verify(*state)) throw CLI::RuntimeError(1);
  });
}

void add_unmerge(CLI::App& app) {
  struct State {
    budwood::UnmergeFilesOptions options;
    Adapters adapters;
  };
  const auto state = std::make_shared<State>();
  auto& options = state->options;
  auto* verb = app.add_subcommand("unmerge", "Write a model as it was before a merge");
  verb->add_option("--model", options.model, "The merged model's folder")->required();
  verb->add_option("--adapter", state->adapters.paths,
                   "Adapter folder; may be given several times, not needed with a backup");
  verb->add_option("--weight", state->adapters.weights, "Weight of each adapter, in their order");
  verb->add_option("--base", options.base,
                   "The folder that they were merged into, if there is one");
  verb->add_option("--out", options.out, "Folder to write")->required();
  verb->add_option("--max-shard-size", options.max_shard_size, "Bytes of one file")
      ->capture_default_str();
  verb->add_option("--jobs", options.jobs, "Threads; 0 = one for each processor")
      ->capture_default_str();
  verb->add_flag("--overwrite", options.overwrite, "Replace the output");
  verb->callback([state] {
    auto& options = state->options;
    options.adapters = merge_sources(state->adapters.paths, state->adapters.weights);
    const auto report = budwood::unmerge_files(options);
    print_warnings(report.warnings);
    std::cout << fmt::format(
        "{} weights changed back in {}, {}\n", report.restored.size(), options.out.string(),
        report.from == "subtracted"
            ? fmt::format("by subtraction: up to {:.3g} % of a change is left", 100 * report.error)
            : "bit for bit, from the " + report.from);
  });
}

void add_convert(CLI::App& app) {
  const auto options = std::make_shared<budwood::ConvertOptions>();
  auto* verb = app.add_subcommand("convert", "Write a LoRA adapter in another library's files");
  verb->add_option("adapter", options->adapter,
                   "Folder of HF PEFT, AdapterHub or MLX, or a GGUF file")
      ->required();
  verb->add_option("--to", options->to, "peft, adapterhub, mlx or gguf")->required();
  verb->add_option("--model", options->model, "The base, for gguf and adapterhub");
  verb->add_option("--out", options->out, "Folder, or GGUF file, to write")->required();
  verb->add_flag("--overwrite", options->overwrite, "Replace the output");
  verb->callback([options] {
    const auto report = budwood::convert(*options);
    print_warnings(report.warnings);
    std::cout << fmt::format("{} modules, {} parameters from {} to {}: {}\n", report.modules,
                             report.parameters, report.from, options->to, options->out.string());
  });
}

}  // namespace

void print_warnings(const std::vector<std::string>& warnings) {
  for (const auto& warning : warnings) std::cerr << "warning: " << warning << "\n";
}

std::vector<budwood::MergeSource> merge_sources(const std::vector<std::string>& adapters,
                                                const std::vector<double>& weights) {
  if (!weights.empty() && weights.size() != adapters.size())
    throw budwood::Error("merge", fmt::format("{} adapters and {} weights are given",
                                              adapters.size(), weights.size()));
  std::vector<budwood::MergeSource> all;
  for (size_t i = 0; i < adapters.size(); ++i)
    all.push_back({adapters[i], weights.empty() ? 1.0 : weights[i]});
  return all;
}

void add_merge_verbs(CLI::App& app) {
  add_merge(app);
  add_unmerge(app);
  add_verify(app);
  add_convert(app);
}
