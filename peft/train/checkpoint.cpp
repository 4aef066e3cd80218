#include <budwood/peft/train/checkpoint.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <budwood/peft/io/text.h>
#include <budwood/peft/json.h>
#include <budwood/peft/train/crc32.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

namespace budwood::train {
namespace {

namespace fs = std::filesystem;
constexpr const char* kFormat = "budwood checkpoint";
constexpr int64_t kVersion = 1;
constexpr const char* kTensors = "state.safetensors";
constexpr const char* kState = "state.json";
constexpr const char* kPrefix = "checkpoint-";

Json file_entry(const fs::path& path) {
  const auto file = io::MappedFile::open(path);
  return {{"bytes", file->size()}, {"crc32", crc32(file->data(), file->size())}};
}

Json as_json(const RunState& s) {
  Json json = {
      {"format", kFormat},
      {"version", kVersion},
      {"step", s.step},
      {"total_steps", s.total_steps},
      {"epoch", s.position.epoch},
      {"batch", s.position.batch},
      {"tokens", s.tokens},
      {"seconds", s.seconds},
      {"loss_sum", s.loss_sum},
      {"loss_tokens", s.loss_tokens},
      {"best", nullptr},
      {"options", Json::parse(s.options)},
      {"data", {{"rows", s.data_rows}, {"tokens", s.data_tokens}, {"crc32", s.data_checksum}}},
      {"base", s.base},
      {"evaluated_step", s.evaluated_step}};
  if (s.best) json["best"] = {{"step", s.best->step}, {"loss", s.best->loss}};
  return json;
}

RunState from_json(const Json& json) {
  if (json.at("format") != kFormat) throw Error("load_checkpoint", "is not a checkpoint's state");
  const auto version = json.at("version").get<int64_t>();
  if (version < 1 || version > kVersion)
    throw Error("load_checkpoint", fmt::format("checkpoint version {}, this Budwood reads up to {}",
                                               version, kVersion));
  RunState s;
  json.at("step").get_to(s.step);
  json.at("total_steps").get_to(s.total_steps);
  json.at("epoch").get_to(s.position.epoch);
  json.at("batch").get_to(s.position.batch);
  json.at("tokens").get_to(s.tokens);
  json.at("seconds").get_to(s.seconds);
  json.at("loss_sum").get_to(s.loss_sum);
  json.at("loss_tokens").get_to(s.loss_tokens);
  if (const auto& best = json.at("best"); !best.is_null())
    s.best = {best.at("step").get<int64_t>(), best.at("loss").get<double>()};
  s.options = json.at("options").dump();
  json.at("data").at("rows").get_to(s.data_rows);
  json.at("data").at("tokens").get_to(s.data_tokens);
  json.at("data").at("crc32").get_to(s.data_checksum);
  json.at("base").get_to(s.base);
  json.at("evaluated_step").get_to(s.evaluated_step);
  return s;
}

void check_files(const fs::path& folder, const Json& files) {
  if (!files.contains(kTensors))
    throw Error("load_checkpoint", fmt::format("{} does not list {}", kState, kTensors));
  for (const auto& [name, entry] : files.items()) {
    if (fs::path(name).filename() != name)
      throw Error("load_checkpoint",
                  fmt::format("{} is not the name of a file", io::in_quotes(name)));
    const auto file = io::MappedFile::open(folder / name);
    const auto bytes = entry.at("bytes").get<uint64_t>();
    if (file->size() != bytes)
      throw Error("load_checkpoint",
                  fmt::format("{} has {} bytes, wanted {}", name, file->size(), bytes));
    if (crc32(file->data(), file->size()) != entry.at("crc32").get<uint32_t>())
      throw Error("load_checkpoint",
                  fmt::format("the checksum of {} is wrong: it is damaged", name));
  }
}

}  // namespace

void save_checkpoint(const fs::path& folder, const Checkpoint& checkpoint,
                     const std::function<void(const fs::path&)>& save_adapter) {
  io::AtomicFolder out(folder, io::Existing::replace);
  if (save_adapter) {
    // The adapter is a folder of its own when it is written; here its files stand beside the state.
    const auto adapter = out.path() / "adapter";
    save_adapter(adapter);
    for (const auto& entry : fs::directory_iterator(adapter))
      fs::rename(entry.path(), out.path() / entry.path().filename());
    fs::remove(adapter);
  }
  write_tensors(out.path() / kTensors, checkpoint.tensors);
  auto json = as_json(checkpoint.state);
  json["files"] = Json::object();
  for (const auto& entry : fs::directory_iterator(out.path()))
    json["files"][entry.path().filename().string()] = file_entry(entry.path());
  io::write_file(out.path() / kState, dump_like_python(json));
  out.commit();
}

Checkpoint load_checkpoint(const fs::path& folder) {
  try {
    const auto json = parse_ordered_json(io::read_file(folder / kState), kState);
    Checkpoint checkpoint{from_json(json), {}};
    check_files(folder, json.at("files"));
    const auto file = io::SafetensorsFile::open(folder / kTensors);
    for (const auto& info : file.tensors())
      checkpoint.tensors.emplace_back(info.name, as_tensor(info));
    return checkpoint;
  } catch (const std::exception& e) {
    throw Error("load_checkpoint",
                fmt::format("{} cannot be resumed from: {}", folder.string(), e.what()));
  }
}

fs::path checkpoint_path(const fs::path& output, int64_t step) {
  return output / fmt::format("{}{}", kPrefix, step);
}

std::vector<std::pair<int64_t, fs::path>> list_checkpoints(const fs::path& output) {
  std::vector<std::pair<int64_t, fs::path>> found;
  std::error_code missing;
  for (const auto& entry : fs::directory_iterator(output, missing)) {
    const auto name = entry.path().filename().string();
    if (!name.starts_with(kPrefix)) continue;
    int64_t step = 0;
    const char* end = name.data() + name.size();
    const auto [stop, error] =
        std::from_chars(name.data() + std::string_view(kPrefix).size(), end, step);
    if (error == std::errc() && stop == end && step >= 0) found.emplace_back(step, entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::optional<Checkpoint> newest_checkpoint(const fs::path& output,
                                            std::vector<std::string>& warnings) {
  auto all = list_checkpoints(output);
  for (auto it = all.rbegin(); it != all.rend(); ++it) {
    try {
      return load_checkpoint(it->second);
    } catch (const Error& e) {
      warnings.push_back(e.what());
    }
  }
  return {};
}

void remove_folder(const fs::path& folder) {
  std::error_code error;
  const auto aside = folder.parent_path() / fmt::format(".{}.removed", folder.filename().string());
  fs::remove_all(aside, error);
  fs::rename(folder, aside, error);
  if (!error) fs::remove_all(aside, error);
  if (error)
    throw Error("remove_folder",
                fmt::format("cannot remove {}: {}", folder.string(), error.message()));
}

void prune_checkpoints(const fs::path& output, int64_t keep) {
  std::error_code ignored;
  std::vector<fs::path> leftovers;  // of a kill in remove_folder
  for (const auto& entry : fs::directory_iterator(output, ignored)) {
    const auto name = entry.path().filename().string();
    if (name.starts_with(std::string(".") + kPrefix) && name.ends_with(".removed"))
      leftovers.push_back(entry.path());
  }
  for (const auto& path : leftovers) fs::remove_all(path, ignored);
  if (keep == 0) return;
  const auto all = list_checkpoints(output);
  for (size_t i = 0; i + static_cast<size_t>(keep) < all.size(); ++i) remove_folder(all[i].second);
}

uint32_t base_fingerprint(const torch::nn::Module& model) {
  at::NoGradGuard no_grad;
  uint32_t crc = 0;
  const auto add = [&](const std::string& name, const at::Tensor& t) {
    if (!t.defined() || t.requires_grad()) return;
    const auto text = fmt::format("{} {} {};", name, dtype_text(t.scalar_type()),
                                  io::shape_text({t.sizes().data(), t.sizes().size()}));
    crc = crc32(text.data(), text.size(), crc);
    if (t.numel() == 0) return;
    const auto flat = t.detach().reshape({-1});
    const auto count = std::min<int64_t>(64, flat.numel());
    auto index = at::empty({count}, at::kLong);
    auto* at = index.data_ptr<int64_t>();
    for (int64_t i = 0; i < count; ++i) at[i] = flat.numel() / count * i;
    const auto sample = flat.index_select(0, index.to(flat.device())).cpu().contiguous();
    crc = crc32(sample.const_data_ptr(), sample.nbytes(), crc);
  };
  for (const auto& item : model.named_parameters()) add(item.key(), item.value());
  for (const auto& item : model.named_buffers()) add(item.key(), item.value());
  return crc;
}

}  // namespace budwood::train
