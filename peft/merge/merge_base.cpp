#include <budwood/peft/io/text.h>
#include <budwood/peft/merge/merge_base.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>

namespace budwood {
namespace {

namespace fs = std::filesystem;
constexpr uint64_t kLargestCarried = 256 << 20;
constexpr uint64_t kLargestConfig = 64 << 20;

std::vector<MergeBaseOpener>& openers() {
  static std::vector<MergeBaseOpener> all;
  return all;
}

bool holds_weights(const std::string& name) {
  static const std::vector<std::string> ends = {".safetensors", ".bin", ".gguf", ".index.json",
                                                ".pt",          ".pth", ".h5",   ".msgpack"};
  for (const auto& end : ends)
    if (name.ends_with(end)) return true;
  return false;
}

}  // namespace

std::unique_ptr<PackedRows> MergeBase::open(const io::TensorInfo& tensor) const {
  throw Error("merge_files", io::in_quotes(tensor.name) + " is not packed");
}

std::unique_ptr<PackedRows> MergeBase::open_rescaled(const io::TensorInfo& tensor, const FoldTerm&,
                                                     double) const {
  throw Error("merge_files", fmt::format("PEQA's scales are those of integer weights in groups; {} "
                                         "of {} is another kind of weight",
                                         io::in_quotes(tensor.name), path().string()));
}

std::string read_config_text(const fs::path& folder) {
  if (!fs::exists(folder / "config.json")) return {};
  auto text = io::read_file(io::file_in_folder(folder, "config.json"), kLargestConfig);
  if (!io::parse_json(text, (folder / "config.json").string()).is_object())
    throw Error("config.json", (folder / "config.json").string() + " is no JSON object");
  return text;
}

std::string quantization_of(const std::string& config) {
  if (config.empty()) return {};
  const auto json = nlohmann::json::parse(config);
  const auto it = json.find("quantization_config");
  return it == json.end() || it->is_null() ? "" : it->dump();
}

void carry_other_files(const fs::path& from, const fs::path& to) {
  for (const auto& entry : fs::directory_iterator(from)) {
    const auto name = entry.path().filename().string();
    if (holds_weights(name) || name.starts_with('.') || name == "config.json" ||
        name == "merge_report.json" || fs::is_directory(entry.path()))
      continue;
    io::write_file(to / name, io::read_file(io::file_in_folder(from, name), kLargestCarried));
  }
}

PlainBase::PlainBase(const fs::path& path)
    : MergeBase(path, fs::is_directory(path) ? read_config_text(path) : ""),
      files_(io::ModelFiles::open(path, io::Access::headers)) {}

void PlainBase::carry_over(const fs::path& folder) const {
  if (fs::is_directory(path())) carry_other_files(path(), folder);
}

bool register_merge_base(MergeBaseOpener opener) {
  openers().push_back(std::move(opener));
  return true;
}

std::unique_ptr<MergeBase> open_merge_base(const fs::path& path) {
  for (const auto& opener : openers())
    if (auto base = opener(path)) return base;
  return std::make_unique<PlainBase>(path);
}

}  // namespace budwood
