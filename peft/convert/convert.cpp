#include <budwood/peft/convert.h>
#include <budwood/peft/convert/lora_set.h>
#include <budwood/peft/merge/adapter_file.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>

namespace budwood {
namespace {

namespace fs = std::filesystem;

void check_output(const ConvertOptions& options, bool single_file) {
  if (options.out.empty()) throw Error("convert", "no output is given");
  if (!fs::exists(options.out)) return;
  const auto text = options.out.string();
  if (!options.overwrite) throw Error("convert", fmt::format("'{}' exists already", text));
  io::require_apart("convert", options.out, {options.adapter, options.model});
  if (fs::is_directory(options.out) == single_file)
    throw Error("convert",
                fmt::format("'{}' is a {}, the output would be a {}", text,
                            single_file ? "folder" : "file", single_file ? "file" : "folder"));
}

const bool registered = register_adapter_converter(
    [](const fs::path& path, const fs::path& model, const fs::path& folder) {
      const auto format = find_lora_format(path);
      if (!format || *format == "peft") return false;
      convert({.adapter = path, .model = model, .out = folder});
      return true;
    });

}  // namespace

ConvertReport convert(const ConvertOptions& options) {
  const auto& to = lora_format(options.to);
  check_output(options, to.single_file);
  const auto from = lora_format_of(options.adapter);
  const ConvertBase base(options.model,
                         to.needs_model ? "a " + options.to + " adapter" : "this adapter");
  if (to.needs_model) base.files();
  auto set = lora_format(from).read(options.adapter, base);
  if (set.modules.empty()) throw Error("convert", options.adapter.string() + " holds no factors");
  if (base.known()) base.check(set);
  to.write(options.out, set, base);
  ConvertReport report{.from = from, .warnings = set.warnings};
  for (const auto& module : set.modules) {
    ++report.modules;
    report.parameters += module.a.size() + module.b.size() + module.magnitude.size();
  }
  return report;
}

}  // namespace budwood
