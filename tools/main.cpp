// The native program: the verbs that need no tokeniser.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <budwood/peft/inject.h>
#include <budwood/peft/inspect.h>
#include <budwood/peft/models/registry.h>
#include <budwood/quant/kernels/isa.h>
#include <budwood/version.h>
#include <iostream>
#include <nlohmann/json.hpp>

namespace {

struct MergeArguments {
  std::string model, adapter, out, dtype = "auto";
  int64_t max_shard_size = 5'000'000'000;
};

void run_merge(const MergeArguments& arguments) {
  auto model = budwood::models::load(arguments.model, {.dtype = "auto"});
  const auto report = budwood::load_adapter(*model, arguments.adapter);
  for (const auto& warning : report.warnings) std::cerr << "warning: " << warning << "\n";
  budwood::merge(*model);
  budwood::models::save(*model, arguments.out,
                        {.dtype = arguments.dtype,
                         .max_shard_size = arguments.max_shard_size,
                         .tokenizer_from = arguments.model});
  std::cout << fmt::format("merged {} places of {} into {}\n", report.places.size(),
                           arguments.adapter, arguments.out);
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
      app.add_subcommand("merge", "Fold an adapter into its model and write a Hugging Face folder");
  merge->add_option("--model", merging.model, "Hugging Face folder or GGUF file")->required();
  merge->add_option("--adapter", merging.adapter, "Adapter folder in HF PEFT's layout")->required();
  merge->add_option("--out", merging.out, "Folder to write; must not exist")->required();
  merge->add_option("--dtype", merging.dtype, "auto, float32, bfloat16 or float16")
      ->capture_default_str();
  merge->add_option("--max-shard-size", merging.max_shard_size, "Bytes of one file")
      ->capture_default_str();

  CLI11_PARSE(app, argc, argv);
  if (*inspect) {
    const auto text = budwood::inspect(path);
    if (json)
      std::cout << text << "\n";
    else
      print_inspection(nlohmann::ordered_json::parse(text));
  } else if (*merge) {
    run_merge(merging);
  }
  return 0;
} catch (const std::exception& e) {
  std::cerr << "budwood: " << e.what() << "\n";
  return 1;
}
