#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/kernels/draw.h>
#include <budwood/peft/optim/block_schedule.h>
#include <budwood/quant/error.h>
#include <algorithm>

namespace budwood::optim {
namespace {

bool is_number(std::string_view text) {
  return !text.empty() && std::ranges::all_of(text, [](char c) { return c >= '0' && c <= '9'; });
}

// A path up to its first number; empty when there is none.
std::string block_path(const std::string& path) {
  for (size_t begin = 0; begin < path.size();) {
    const size_t dot = std::min(path.find('.', begin), path.size());
    if (is_number(std::string_view(path).substr(begin, dot - begin))) return path.substr(0, dot);
    begin = dot + 1;
  }
  return {};
}

// The first `count` of all blocks in random order.
std::vector<int64_t> shuffled(int64_t blocks, int64_t count, uint64_t seed, int64_t round) {
  return kernels::draw(
      blocks, count,
      {seed, static_cast<uint32_t>(round), static_cast<uint32_t>(round >> 32), 0x6c697361u});
}

}  // namespace

void BlockOptions::validate() const {
  if (kind != "lisa" && kind != "badam")
    throw Error("BlockOptions", fmt::format("kind is '{}', wanted 'lisa' or 'badam'", kind));
  if (active < 1)
    throw Error("BlockOptions", fmt::format("active is {}, wanted 1 or more", active));
  if (every < 1) throw Error("BlockOptions", fmt::format("every is {}, wanted 1 or more", every));
  if (order != "random" && order != "ascending" && order != "descending")
    throw Error("BlockOptions", fmt::format("order is '{}', wanted 'random', 'ascending' or "
                                            "'descending'",
                                            order));
}

BlockSchedule::BlockSchedule(const NamedTensors& parameters, BlockOptions options)
    : parameters_(parameters), options_(std::move(options)) {
  options_.validate();
  for (const auto& [path, p] : parameters_) {
    const auto block = block_path(path);
    if (block.empty()) {
      block_of_.push_back(-1);
      continue;
    }
    const auto at = std::ranges::find(blocks_, block);
    block_of_.push_back(at - blocks_.begin());
    if (at == blocks_.end()) blocks_.push_back(block);
  }
  if (blocks_.empty())
    throw Error("BlockSchedule",
                "no path of a parameter has a number, as 'layers.3' has: there are "
                "no blocks to choose from");
  if (options_.kind == "lisa" && options_.active > static_cast<int64_t>(blocks_.size()))
    throw Error("BlockSchedule", fmt::format("{} blocks are to be active, the model has {}",
                                             options_.active, blocks_.size()));
}

std::vector<int64_t> BlockSchedule::active(int64_t step) const {
  const auto count = static_cast<int64_t>(blocks_.size());
  const int64_t period = step / options_.every;
  if (options_.kind == "lisa") {
    auto chosen = shuffled(count, options_.active, options_.seed, period);
    std::ranges::sort(chosen);
    return chosen;
  }
  const int64_t place = period % count;
  if (options_.order == "ascending") return {place};
  if (options_.order == "descending") return {count - 1 - place};
  return {shuffled(count, count, options_.seed, period / count)[static_cast<size_t>(place)]};
}

std::vector<bool> BlockSchedule::trained(int64_t step) const {
  const auto now = active(step);
  std::vector<bool> all;
  for (const int64_t block : block_of_)
    all.push_back(block < 0 ? options_.kind == "lisa" : std::ranges::binary_search(now, block));
  return all;
}

void BlockSchedule::apply(Optimizer& optimizer, int64_t step) const {
  const auto now = trained(step);
  const bool begins = step % options_.every == 0;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    auto p = parameters_[i].second;
    p.set_requires_grad(now[i]);
    if (!now[i]) p.mutable_grad() = at::Tensor();
    if (block_of_[i] >= 0 && (begins || !now[i])) optimizer.forget(i);
  }
}

void BlockSchedule::thaw() const {
  for (auto [path, p] : parameters_) p.set_requires_grad(true);
}

std::vector<std::string> BlockSchedule::never_trained() const {
  std::vector<std::string> paths;
  if (options_.kind == "badam")
    for (size_t i = 0; i < parameters_.size(); ++i)
      if (block_of_[i] < 0) paths.push_back(parameters_[i].first);
  return paths;
}

}  // namespace budwood::optim
