// The native program: the verbs that need no tokeniser.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <budwood/peft/combine.h>
#include <budwood/peft/extract.h>
#include <budwood/peft/inspect.h>
#include <budwood/peft/models/quantize_files.h>
#include <budwood/quant/kernels/isa.h>
#include <budwood/version.h>
#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "verbs.h"

namespace {

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
  options.adapters = merge_sources(adapters, weights);
  const auto report = budwood::combine(options);
  print_warnings(report.warnings);
  for (const auto& module : report.modules)
    std::cout << fmt::format("  {:<48} rank {:<4} delta norm {:<10.4g} error {:.3g}\n", module.path,
                             module.rank, module.delta_norm, module.error);
  std::cout << fmt::format("{} modules written to {}\n", report.modules.size(),
                           options.out.string());
}

void run_quantize(budwood::models::QuantizeFilesOptions& options) {
  const auto report = budwood::models::quantize_files(options);
  print_warnings(report.warnings);
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

  add_merge_verbs(app);

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
