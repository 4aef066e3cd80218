#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

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
                             uint64_t max_shard_bytes, Metadata metadata)
    : folder_(std::move(folder)),
      metadata_(std::move(metadata)),
      shards_(plan_shards(tensors, max_shard_bytes)) {
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
    order_.insert(order_.end(), shards_[i].begin(), shards_[i].end());
  }
  open_next();
}

// Opens the current shard; finishes it and moves on as long as it needs no data.
void ShardedWriter::open_next() {
  writer_ =
      std::make_unique<SafetensorsWriter>(folder_ / names_[shard_], shards_[shard_], metadata_);
  while (writer_->complete() && shard_ + 1 < shards_.size()) {
    writer_->commit();
    ++shard_;
    writer_ =
        std::make_unique<SafetensorsWriter>(folder_ / names_[shard_], shards_[shard_], metadata_);
  }
}

void ShardedWriter::write(std::string_view name, const void* data, size_t bytes) {
  if (bytes == 0) return;  // an empty tensor may belong to a shard that is finished already
  writer_->write(name, data, bytes);
  if (writer_->complete() && shard_ + 1 < shards_.size()) {
    writer_->commit();
    ++shard_;
    open_next();
  }
}

void ShardedWriter::commit() {
  if (shard_ + 1 < shards_.size())
    throw Error("ShardedWriter",
                fmt::format("{}: shard {} of {} is not complete",
                            (folder_ / names_[shard_]).string(), shard_ + 1, shards_.size()));
  writer_->commit();
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
