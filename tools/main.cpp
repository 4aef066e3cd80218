// The native program: the verbs that need no tokeniser.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include <budwood/peft/combine.h>
#include <budwood/peft/extract.h>
#include <budwood/peft/inject.h>
#include <budwood/peft/inspect.h>
#include <budwood/peft/merge.h>
#include <budwood/peft/models/quantize_files.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/isa.h>
#include <budwood/version.h>
#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

namespace {

struct MergeArguments {
  std::string model, out, dtype = "auto";
  std::vector<std::string> adapters;
  std::vector<double> weights;
  uint64_t max_shard_size = 5'000'000'000;
  int jobs = 0;
  bool overwrite = false, json = false;
};

void warn(const std::vector<std::string>& warnings) {
  for (const auto& warning : warnings) std::cerr << "warning: " << warning << "\n";
}

// A GGUF file, a quantised base and adapters that need the base to be understood.
void merge_in_memory(const MergeArguments& arguments) {
  auto model = budwood::models::load(arguments.model, {.dtype = "auto"});
  std::vector<std::string> names;
  for (size_t i = 0; i < arguments.adapters.size(); ++i) {
    names.push_back(fmt::format("adapter{}", i));
    warn(budwood::load_adapter(*model, arguments.adapters[i], names.back()).warnings);
    for (const auto& module : model->modules())
      if (const auto* slot = dynamic_cast<budwood::Slot*>(module.get()))
        if (const auto adapter = slot->adapter(names.back()))
          adapter->set_weight(arguments.weights[i]);
  }
  budwood::merge(*model, names);
  budwood::models::save(*model, arguments.out,
                        {.dtype = arguments.dtype,
                         .max_shard_size = static_cast<int64_t>(arguments.max_shard_size),
                         .overwrite = arguments.overwrite,
                         .tokenizer_from = arguments.model});
  std::cout << fmt::format("merged {} into {}\n", fmt::join(arguments.adapters, ", "),
                           arguments.out);
}

std::vector<budwood::MergeSource> sources(const std::vector<std::string>& adapters,
                                          std::vector<double>& weights) {
  if (weights.empty()) weights.assign(adapters.size(), 1.0);
  if (weights.size() != adapters.size())
    throw budwood::Error("merge", fmt::format("{} adapters and {} weights are given",
                                              adapters.size(), weights.size()));
  std::vector<budwood::MergeSource> all;
  for (size_t i = 0; i < adapters.size(); ++i) all.push_back({adapters[i], weights[i]});
  return all;
}

void run_merge(MergeArguments& arguments) {
  budwood::MergeFilesOptions options;
  options.model = arguments.model;
  options.adapters = sources(arguments.adapters, arguments.weights);
  options.out = arguments.out;
  options.dtype = arguments.dtype;
  options.max_shard_size = arguments.max_shard_size;
  options.jobs = arguments.jobs;
  options.overwrite = arguments.overwrite;
  if (const auto why = budwood::why_not_streamed(options)) {
    std::cerr << fmt::format("{}: merging with the model in memory\n", *why);
    return merge_in_memory(arguments);
  }
  const auto report = budwood::merge_files(options);
  warn(report.warnings);
  if (arguments.json) {
    std::cout << report.to_json(options);
    return;
  }
  const auto largest =
      std::max_element(report.merged.begin(), report.merged.end(),
                       [](const auto& a, const auto& b) { return a.error < b.error; });
  std::cout << fmt::format("{} weights changed, {} replaced; {:.1f} MB in {} file{} of {}\n",
                           report.merged.size(), report.replaced.size(),
                           static_cast<double>(report.bytes) / 1e6, report.files.size(),
                           report.files.size() == 1 ? "" : "s", arguments.out);
  if (largest != report.merged.end())
    std::cout << fmt::format("rounding took at most {:.3g} % of a change ({})\n",
                             100 * largest->error, largest->name);
}

struct VerifyArguments {
  std::string model, merged;
  std::vector<std::string> adapters;
  std::vector<double> weights;
  double tolerance = 1.0;
  bool json = false;
};

bool run_verify(VerifyArguments& arguments) {
  budwood::MergeFilesOptions options;
  options.model = arguments.model;
  options.out = arguments.merged;
  options.adapters = sources(arguments.adapters, arguments.weights);
  const auto report = budwood::verify_files(options);
  const bool passed = report.passed(arguments.tolerance);
  if (arguments.json) {
    std::cout << report.to_json(arguments.tolerance);
    return passed;
  }
  for (const auto& fault : report.faults) std::cout << fault << "\n";
  for (const auto& tensor : report.tensors)
    if (!tensor.equal)
      std::cout << fmt::format("  {:<48} {:>8.3g} steps  survival {:.4f}  error {:.3g} %\n",
                               tensor.name, tensor.steps, tensor.survival, 100 * tensor.error);
  std::cout << fmt::format("{} tensors compared: {} within {} steps\n", report.tensors.size(),
                           passed ? "all" : "not all", arguments.tolerance);
  return passed;
}

void run_extract(const budwood::ExtractOptions& options) {
  const auto report = budwood::extract(options);
  for (const auto& module : report.modules)
    std::cout << fmt::format("  {:<48} rank {:<4} delta norm {:<10.4g} kept {:.4f} %\n",
                             module.path, module.rank, module.delta_norm, 100 * module.energy);
  for (const auto& lost : report.lost)
    std::cerr << fmt::format("warning: {} differs by {:.4g} and is not in the adapter\n", lost.name,
                             lost.delta_norm);
  std::cout << fmt::format("{} modules, {} parameters, written to {}; {} targets do not differ\n",
                           report.modules.size(), report.parameters, options.out.string(),
                           report.identical.size());
}

void run_combine(budwood::CombineOptions& options, const std::vector<std::string>& adapters,
                 std::vector<double>& weights) {
  options.adapters = sources(adapters, weights);
  const auto report = budwood::combine(options);
  warn(report.warnings);
  for (const auto& module : report.modules)
    std::cout << fmt::format("  {:<48} rank {:<4} delta norm {:<10.4g} error {:.3g}\n", module.path,
                             module.rank, module.delta_norm, module.error);
  std::cout << fmt::format("{} modules written to {}\n", report.modules.size(),
                           options.out.string());
}

void run_quantize(budwood::models::QuantizeFilesOptions& options) {
  const auto report = budwood::models::quantize_files(options);
  for (const auto& warning : report.warnings) std::cerr << "warning: " << warning << "\n";
  std::cout << fmt::format(
      "{} matrices, {:.1f} M weights at {:.2f} bits, error {:.2f} %, written to {}\n",
      report.matrices.size(), static_cast<double>(report.weights) / 1e6,
      8.0 * static_cast<double>(report.bytes) /
          static_cast<double>(std::max<int64_t>(1, report.weights)),
      100 * report.error, options.out);
}

void add_quantize_options(CLI::App& verb, budwood::models::QuantizeFilesOptions& options) {
  verb.add_option("--model", options.model, "Hugging Face folder or GGUF file")->required();
  verb.add_option("--out", options.out, "Folder, or GGUF file, to write")->required();
  verb.add_option("--format", options.format,
                  "nf4, fp4, int8, int4; for a GGUF q4_0, q4_1, q8_0, f16, bf16, f32")
      ->capture_default_str();
  verb.add_option("--method", options.method, "rtn; for int4 and int8 also hqq, gptq, awq")
      ->capture_default_str();
  verb.add_option("--calibration", options.calibration, "Token file, for gptq and awq");
  verb.add_option("--block-size", options.block_size, "Numbers of a row that share a scale")
      ->capture_default_str();
  verb.add_flag("--double-quant", options.double_quant, "nf4 and fp4: pack the scales too");
  verb.add_option("--act-order", options.act_order, "gptq: large activations first")
      ->capture_default_str();
  verb.add_option("--static-groups", options.static_groups, "gptq: groups of neighbours")
      ->capture_default_str();
  verb.add_option("--calibration-tokens", options.calibration_tokens, "Tokens that are used")
      ->capture_default_str();
  verb.add_option("--sequence-length", options.sequence_length, "Longest calibration sequence")
      ->capture_default_str();
  verb.add_option("--skip", options.skip, "Matrices with this in their names stay plain")
      ->capture_default_str();
  verb.add_option("--dtype", options.dtype, "auto, float32, bfloat16 or float16")
      ->capture_default_str();
  verb.add_option("--max-shard-size", options.max_shard_size, "Bytes of one file")
      ->capture_default_str();
  verb.add_flag("--overwrite", options.overwrite, "Replace the output");
}

std::string shape_of(const nlohmann::ordered_json& tensor) {
  std::string text;
  for (const auto& size : tensor.at("shape")) text += (text.empty() ? "" : " x ") + size.dump();
  return text.empty() ? "scalar" : text;
}

void print_inspection(const nlohmann::ordered_json& info) {
  std::cout << fmt::format("{}  {}\n", info.at("kind").get<std::string>(),
                           info.at("path").get<std::string>());
  for (const auto& [key, value] : info.items())
    if (key != "kind" && key != "path" && key != "tensors" && key != "modules" && key != "config" &&
        key != "metadata")
      std::cout << fmt::format("  {:<12} {}\n", key,
                               value.is_string() ? value.get<std::string>() : value.dump());
  if (info.contains("modules"))
    for (const auto& module : info.at("modules"))
      std::cout << fmt::format("  {:<44} rank {:<4} scaling {:<8.4g} delta norm {:.4g}\n",
                               module.at("path").get<std::string>(), module.value("rank", 0),
                               module.value("scaling", 0.0), module.value("delta_norm", 0.0));
  else
    for (const auto& tensor : info.at("tensors"))
      std::cout << fmt::format("  {:<48} {:<6} {}\n", tensor.at("name").get<std::string>(),
                               tensor.at("dtype").get<std::string>(), shape_of(tensor));
}

}  // namespace

int main(int argc, char** argv) try {
  CLI::App app{"Budwood: adapters on frozen models"};
  app.set_version_flag(
      "--version",
      fmt::format("budwood {} (torch {}, {})", BUDWOOD_VERSION, BUDWOOD_BUILT_WITH_TORCH,
                  budwood::quant::kernels::isa_name(budwood::quant::kernels::active_isa())));
  app.require_subcommand(1);

  std::string path;
  bool json = false;
  auto* inspect =
      app.add_subcommand("inspect", "Say what an adapter, safetensors, GGUF or model folder is");
  inspect->add_option("path", path, "File or folder")->required();
  inspect->add_flag("--json", json, "Print JSON");

  MergeArguments merging;
  auto* merge =
      app.add_subcommand("merge", "Fold adapters into their model and write a Hugging Face folder");
  merge->add_option("--model", merging.model, "Hugging Face folder or GGUF file")->required();
  merge->add_option("--adapter", merging.adapters, "Adapter folder; may be given several times")
      ->required();
  merge->add_option("--weight", merging.weights, "Weight of each adapter, in their order");
  merge->add_option("--out", merging.out, "Folder to write; must not exist")->required();
  merge->add_option("--dtype", merging.dtype, "auto, float32, bfloat16 or float16")
      ->capture_default_str();
  merge->add_option("--max-shard-size", merging.max_shard_size, "Bytes of one file")
      ->capture_default_str();
  merge->add_option("--jobs", merging.jobs, "Threads; 0 = one for each processor")
      ->capture_default_str();
  merge->add_flag("--overwrite", merging.overwrite, "Replace the output");
  merge->add_flag("--json", merging.json, "Print the report as JSON");

  VerifyArguments verifying;
  auto* verify =
      app.add_subcommand("verify", "Compare a merged model with what model and adapters make");
  verify->add_option("--model", verifying.model, "Hugging Face folder")->required();
  verify->add_option("--adapter", verifying.adapters, "Adapter folder; may be given several times")
      ->required();
  verify->add_option("--weight", verifying.weights, "Weight of each adapter, in their order");
  verify->add_option("--merged", verifying.merged, "The merged model's folder")->required();
  verify
      ->add_option("--tolerance", verifying.tolerance,
                   "Allowed distance from the exact value, in steps of the dtype")
      ->capture_default_str();
  verify->add_flag("--json", verifying.json, "Print JSON");

  budwood::ExtractOptions extracting;
  auto* extract =
      app.add_subcommand("extract", "Make a LoRA adapter from the difference of two models");
  extract->add_option("--base", extracting.base, "The original model's folder")->required();
  extract->add_option("--tuned", extracting.tuned, "The tuned model's folder")->required();
  extract->add_option("--out", extracting.out, "Adapter folder to write")->required();
  extract->add_option("--rank", extracting.rank, "Rank of every module");
  extract->add_option("--energy", extracting.energy,
                      "Instead: the part of each squared difference to keep");
  extract->add_option("--target", extracting.targets, "Ends of module paths; all but the head");
  extract->add_flag("--overwrite", extracting.overwrite, "Replace the output");

  budwood::CombineOptions combining;
  std::vector<std::string> combined;
  std::vector<double> combined_weights;
  auto* combine = app.add_subcommand("combine", "Make one LoRA adapter of several");
  combine->add_option("--adapter", combined, "Adapter folder; may be given several times")
      ->required();
  combine->add_option("--weight", combined_weights, "Weight of each adapter, in their order");
  combine->add_option("--out", combining.out, "Adapter folder to write")->required();
  combine->add_option("--mode", combining.mode, "cat, svd, linear, ties, dare or dare_ties")
      ->capture_default_str();
  combine->add_option("--rank", combining.rank, "Of svd, ties and dare; 0 = the largest")
      ->capture_default_str();
  combine->add_option("--density", combining.density, "Of ties and dare: entries that are kept")
      ->capture_default_str();
  combine->add_option("--seed", combining.seed, "Of dare")->capture_default_str();
  combine->add_flag("--overwrite", combining.overwrite, "Replace the output");

  budwood::models::QuantizeFilesOptions quantizing;
  auto* quantize = app.add_subcommand("quantize", "Pack a model's weights in 4 or 8 bits");
  add_quantize_options(*quantize, quantizing);

  CLI11_PARSE(app, argc, argv);
  if (*inspect) {
    const auto text = budwood::inspect(path);
    if (json)
      std::cout << text << "\n";
    else
      print_inspection(nlohmann::ordered_json::parse(text));
  } else if (*merge) {
    run_merge(merging);
  } else if (*verify) {
    return run_verify(verifying) ? 0 : 1;
  } else if (*extract) {
    run_extract(extracting);
  } else if (*combine) {
    run_combine(combining, combined, combined_weights);
  } else if (*quantize) {
    run_quantize(quantizing);
  }
  return 0;
} catch (const std::exception& e) {
  std::cerr << "budwood: " << e.what() << "\n";
  return 1;
}
