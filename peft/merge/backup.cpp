#include <budwood/peft/io/text.h>
#include <budwood/peft/merge/backup.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace budwood {
namespace {

constexpr const char* kBackup = "merge_backup.safetensors";
constexpr const char* kKey = "budwood.backup";
constexpr uint64_t kPiece = 1 << 20;

}  // namespace

void write_backup(const MergePlan& plan, const std::filesystem::path& folder) {
  std::vector<io::TensorSpec> specs;
  nlohmann::ordered_json about = {{"version", 1}, {"config", plan.base->config()}};
  about["added"] = nlohmann::ordered_json::array();
  for (const auto& output : plan.outputs) {
    const auto& source = *output.source;
    if (output.spec.name != source.name) {
      about["added"].push_back(output.spec.name);
      continue;
    }
    if (!output.changed() && output.spec.dtype == source.dtype) continue;
    if (plan.base->packed(source))
      throw Error("merge_files",
                  "a backup holds plain weights, and the model is quantised: keep "
                  "the model itself");
    specs.push_back({source.name, source.dtype, source.shape});
  }
  io::SafetensorsWriter writer(folder / kBackup, specs, {{kKey, about.dump()}});
  std::vector<std::byte> bytes;
  for (const auto& spec : writer.order()) {
    const auto& source = *plan.base->find(spec.name);
    for (uint64_t at = 0; at < source.bytes(); at += kPiece) {
      bytes.resize(std::min(kPiece, source.bytes() - at));
      plan.base->read(source, at, bytes.data(), bytes.size());
      writer.write(spec.name, bytes.data(), bytes.size());
    }
  }
  writer.commit();
}

std::optional<MergeBackup> read_backup(const std::filesystem::path& folder) {
  const auto path = folder / kBackup;
  if (!std::filesystem::exists(path)) return {};
  auto file = io::SafetensorsFile::open(path);
  const auto it = file.metadata().find(kKey);
  if (it == file.metadata().end())
    throw Error("unmerge_files", fmt::format("{} has no {} in its metadata", path.string(), kKey));
  const auto about = io::parse_json(it->second, path.string());
  if (about.value("version", 0) != 1)
    throw Error("unmerge_files", fmt::format("{} is of another version", path.string()));
  return MergeBackup{std::move(file), about.value("config", std::string()),
                     about.value("added", std::vector<std::string>())};
}

}  // namespace budwood
