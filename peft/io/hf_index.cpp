#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

namespace budwood::io {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kWhere = "ModelFiles";
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr uint64_t kMaxIndex = 100'000'000;

bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
}

bool starts_with(const fs::path& path, const fs::path& prefix) {
  return std::mismatch(path.begin(), path.end(), prefix.begin(), prefix.end()).second ==
         prefix.end();
}

// The hub's cache: models--x/snapshots/<revision>/[sub/]<name> -> ../../[../]blobs/<hash>.
bool is_hub_link(const fs::path& folder, const fs::path& link, const fs::path& real) {
  const std::string hash = real.filename().string();
  if (hash.size() != 40 && hash.size() != 64) return false;
  if (hash.find_first_not_of("0123456789abcdef") != std::string::npos) return false;
  const fs::path blobs = real.parent_path();
  return link.is_relative() && blobs.filename() == "blobs" &&
         (folder / link).lexically_normal() == real &&
         starts_with(folder, blobs.parent_path() / "snapshots") &&
         folder != blobs.parent_path() / "snapshots";
}

// {tensor: file} of an index, every file name a plain one.
std::map<std::string, std::string> read_weight_map(const fs::path& path) {
  const auto refuse = [&](const std::string& fact) {
    throw Error(kWhere, fmt::format("{}: {}", path.string(), fact));
  };
  const auto index = parse_json(read_file(path, kMaxIndex), path.string());
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object())
    refuse("no object \"weight_map\"");
  std::map<std::string, std::string> map;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    if (!file.is_string())
      refuse(fmt::format("the file of tensor {} is {}, a string is needed", in_quotes(tensor),
                         file.type_name()));
    const auto& name = file.get_ref<const std::string&>();
    if (!is_plain_name(name))
      refuse(fmt::format("tensor {} is said to be in {}, which is not a plain file name",
                         in_quotes(tensor), in_quotes(name)));
    if (!name.ends_with(".safetensors"))
      refuse(fmt::format("tensor {} is said to be in {}, which is not a .safetensors file",
                         in_quotes(tensor), in_quotes(name)));
    map.emplace(tensor, name);
  }
  if (map.empty()) refuse("\"weight_map\" is empty");
  return map;
}

}  // namespace

fs::path file_in_folder(const fs::path& folder, const std::string& name) {
  if (!is_plain_name(name))
    throw Error("file_in_folder", fmt::format("{} is not a plain file name", in_quotes(name)));
  const fs::path path = folder / name;
  std::error_code error;
  const auto status = fs::symlink_status(path, error);
  if (!fs::exists(status))
    throw Error("file_in_folder",
                fmt::format("{} does not exist in {}", in_quotes(name), folder.string()));
  if (!fs::is_symlink(status)) return path;
  const fs::path link = fs::read_symlink(path, error);
  const fs::path real = fs::canonical(path, error);
  if (error)
    throw Error("file_in_folder", fmt::format("{} is a link to {}, which does not exist",
                                              path.string(), link.string()));
  const fs::path root = fs::canonical(folder, error);
  if (error || (!starts_with(real, root) && !is_hub_link(root, link, real)))
    throw Error("file_in_folder",
                fmt::format("{} is a link to {}, outside the folder; only links of the Hugging "
                            "Face cache (../../blobs/<hash>) may lead there",
                            path.string(), link.string()));
  return path;
}

ModelFiles ModelFiles::open(const fs::path& path, Access access) {
  ModelFiles model(path, access);
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) {
    model.open_single(path);
  } else {
    const bool single = fs::exists(fs::symlink_status(path / kSingle, ignored));
    const bool index = fs::exists(fs::symlink_status(path / kIndex, ignored));
    if (index)
      model.open_shards(path);
    else if (single)
      model.open_single(file_in_folder(path, kSingle));
    else
      throw Error(kWhere,
                  fmt::format("{} holds neither {} nor {}", path.string(), kSingle, kIndex));
  }
  for (size_t i = 0; i < model.files_.size(); ++i) {
    for (const auto& tensor : model.files_[i].tensors()) {
      model.tensors_.push_back(&tensor);
      model.index_.emplace(tensor.name, &tensor);
      model.file_of_.emplace(&tensor, i);
    }
    if (access == Access::headers) model.readers_.emplace_back(model.files_[i].path());
  }
  return model;
}

SafetensorsFile ModelFiles::open_file(const fs::path& file) const {
  return access_ == Access::mapped ? SafetensorsFile::open(file)
                                   : SafetensorsFile::open_header(file);
}

void ModelFiles::read(const TensorInfo& tensor, uint64_t begin, void* to, size_t bytes) const {
  const size_t i = file_of_.at(&tensor);
  if (begin > tensor.bytes() || bytes > tensor.bytes() - begin)
    throw Error(kWhere, fmt::format("the tensor {} holds {} bytes, those from {} to {} were asked "
                                    "for",
                                    in_quotes(tensor.name), tensor.bytes(), begin, begin + bytes));
  readers_.at(i).read(files_[i].data_begin() + tensor.begin + begin, to, bytes);
}

void ModelFiles::open_single(const fs::path& file) {
  files_.push_back(open_file(file));
}

void ModelFiles::open_shards(const fs::path& folder) {
  const fs::path index = file_in_folder(folder, kIndex);
  const auto map = read_weight_map(index);
  std::map<std::string, size_t> shards;  // tensors that the index places in each file
  for (const auto& [tensor, file] : map) ++shards[file];
  std::error_code ignored;
  if (!shards.contains(kSingle) && fs::exists(fs::symlink_status(folder / kSingle, ignored)))
    throw Error(kWhere, fmt::format("{} holds both {} and {}, which does not name it; remove the "
                                    "one that is out of date",
                                    folder.string(), kSingle, kIndex));
  for (const auto& [name, count] : shards) {
    files_.push_back(open_file(file_in_folder(folder, name)));
    for (const auto& tensor : files_.back().tensors()) {
      const auto it = map.find(tensor.name);
      if (it == map.end())
        throw Error(kWhere, fmt::format("{} holds the tensor {}, which {} does not list",
                                        files_.back().path().string(), in_quotes(tensor.name),
                                        index.filename().string()));
      if (it->second != name)
        throw Error(kWhere, fmt::format("{} holds the tensor {}, which {} places in {}",
                                        files_.back().path().string(), in_quotes(tensor.name),
                                        index.filename().string(), in_quotes(it->second)));
    }
    if (files_.back().tensors().size() == count) continue;
    for (const auto& [tensor, file] : map)
      if (file == name && !files_.back().find(tensor))
        throw Error(kWhere, fmt::format("{} lacks the tensor {}, which {} places there",
                                        files_.back().path().string(), in_quotes(tensor),
                                        index.filename().string()));
  }
}

const TensorInfo* ModelFiles::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : it->second;
}

const TensorInfo& ModelFiles::at(std::string_view name) const {
  const TensorInfo* tensor = find(name);
  if (!tensor)
    throw Error(kWhere, fmt::format("{} has no tensor {}; it holds {} tensors", path_.string(),
                                    in_quotes(name), tensors_.size()));
  return *tensor;
}

}  // namespace budwood::io
