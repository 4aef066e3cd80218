#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_set>

namespace budwood::io {

std::vector<std::vector<TensorSpec>> plan_shards(const std::vector<TensorSpec>& tensors,
                                                 uint64_t max_bytes) {
  if (max_bytes == 0) throw Error("plan_shards", "the largest size of a shard is 0 bytes");
  std::vector<std::vector<TensorSpec>> shards;
  std::vector<TensorSpec> current;
  uint64_t current_bytes = 0;
  for (const auto& tensor : tensors) {
    const uint64_t bytes = tensor.bytes();
    if (bytes > max_bytes) {
      shards.push_back({tensor});
      continue;
    }
    if (bytes > max_bytes - current_bytes) {
      shards.push_back(std::move(current));
      current.clear();
      current_bytes = 0;
    }
    current.push_back(tensor);
    current_bytes += bytes;
  }
  if (!current.empty() || shards.empty()) shards.push_back(std::move(current));
  return shards;
}

ShardedWriter::ShardedWriter(std::filesystem::path folder, const std::vector<TensorSpec>& tensors,
                             uint64_t max_shard_bytes, Metadata metadata,
                             const std::vector<std::string>& present)
    : folder_(std::move(folder)),
      metadata_(std::move(metadata)),
      shards_(plan_shards(tensors, max_shard_bytes)),
      finished_(shards_.size()) {
  std::unordered_set<std::string_view> names;
  for (const auto& tensor : tensors)
    if (!names.insert(tensor.name).second)
      throw Error("ShardedWriter",
                  fmt::format("two tensors are called {}", in_quotes(tensor.name)));
  for (size_t i = 0; i < shards_.size(); ++i) {
    names_.push_back(shards_.size() == 1
                         ? "model.safetensors"
                         : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards_.size()));
    shards_[i] = in_reference_order(std::move(shards_[i]));
    finished_[i] = std::find(present.begin(), present.end(), names_[i]) != present.end();
    if (finished_[i])
      check_present(i);
    else
      order_.insert(order_.end(), shards_[i].begin(), shards_[i].end());
  }
  open_next();
}

void ShardedWriter::check_present(size_t shard) const {
  const auto file = SafetensorsFile::open_header(folder_ / names_[shard]);
  bool same = file.tensors().size() == shards_[shard].size();
  for (const auto& tensor : shards_[shard]) {
    const auto* found = file.find(tensor.name);
    same &= found != nullptr && found->dtype == tensor.dtype && found->shape == tensor.shape;
  }
  if (!same)
    throw Error("ShardedWriter",
                fmt::format("{} does not hold the tensors of that shard", file.path().string()));
}

// Opens the next shard that needs data; finishes those that need none.
void ShardedWriter::open_next() {
  for (; shard_ < shards_.size(); ++shard_) {
    if (finished_[shard_]) continue;
    writer_ =
        std::make_unique<SafetensorsWriter>(folder_ / names_[shard_], shards_[shard_], metadata_);
    if (!writer_->complete()) return;
    writer_->commit();
    finished_[shard_] = true;
  }
  writer_.reset();
}

void ShardedWriter::write(std::string_view name, const void* data, size_t bytes) {
  if (bytes == 0) return;  // an empty tensor may belong to a shard that is finished already
  if (!writer_)
    throw Error("ShardedWriter", fmt::format("{} comes after the last one", in_quotes(name)));
  writer_->write(name, data, bytes);
  if (!writer_->complete()) return;
  writer_->commit();
  finished_[shard_] = true;
  open_next();
}

std::vector<std::string> ShardedWriter::finished() const {
  std::vector<std::string> names;
  for (size_t i = 0; i < names_.size(); ++i)
    if (finished_[i]) names.push_back(names_[i]);
  return names;
}

void ShardedWriter::commit() {
  if (writer_ && shard_ + 1 == shards_.size()) writer_->commit();  // which says what is missing
  if (writer_)
    throw Error("ShardedWriter",
                fmt::format("{}: shard {} of {} is not complete",
                            (folder_ / names_[shard_]).string(), shard_ + 1, shards_.size()));
  if (shards_.size() == 1) return;
  uint64_t parameters = 0, bytes = 0;
  nlohmann::json map = nlohmann::json::object();
  for (size_t i = 0; i < shards_.size(); ++i)
    for (const auto& tensor : shards_[i]) {
      parameters += element_count(tensor.shape).value();
      bytes += tensor.bytes();
      map[tensor.name] = names_[i];
    }
  const nlohmann::json index = {
      {"metadata", {{"total_parameters", parameters}, {"total_size", bytes}}},
      {"weight_map", std::move(map)}};
  write_file(folder_ / "model.safetensors.index.json", index.dump(2, ' ', true) + "\n");
}

}  // namespace budwood::io
