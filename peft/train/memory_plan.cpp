#include <ATen/ATen.h>
#include <sys/mman.h>
#include <unistd.h>

#include <budwood/peft/train/memory_plan.h>
#include <algorithm>
#include <fstream>
#include <map>
#include <string>
#include <unordered_set>
#include <vector>

namespace budwood::train {
namespace {

struct Range {
  uintptr_t begin, end;
  bool holds(uintptr_t p) const { return begin <= p && p < end; }
};

// Mappings of files into this process's memory.
std::vector<Range> mapped_files() {
  std::vector<Range> ranges;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find('/') == std::string::npos) continue;
    size_t dash = 0;
    const auto begin = std::stoull(line, &dash, 16);
    ranges.push_back({begin, std::stoull(line.substr(dash + 1), nullptr, 16)});
  }
  return ranges;
}

int64_t resident_now() {
  std::ifstream statm("/proc/self/statm");
  int64_t all = 0, resident = 0;
  statm >> all >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

// How much of some memory is in RAM.
int64_t resident_part(uintptr_t begin, int64_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t from = begin / page * page, to = begin + static_cast<uintptr_t>(bytes);
  std::vector<unsigned char> in((to - from + page - 1) / page);
  if (mincore(reinterpret_cast<void*>(from), to - from, in.data()) != 0) return 0;
  const auto count = std::count_if(in.begin(), in.end(), [](unsigned char c) { return c & 1; });
  return std::min<int64_t>(bytes, count * static_cast<int64_t>(page));
}

}  // namespace

int64_t MemoryPlan::total() const {
  return process + weights + adapters + gradients + optimizer + activations + workspace;
}

MemoryPlan plan_memory(const models::CausalLM& model, int64_t tokens) {
  MemoryPlan plan;
  const auto files = mapped_files();
  std::unordered_set<const void*> seen;
  int64_t resident = 0;
  const auto count = [&](const at::Tensor& t) {
    if (!t.defined() || !seen.insert(t.storage().data()).second) return;
    const auto bytes = static_cast<int64_t>(t.storage().nbytes());
    if (t.requires_grad()) {
      plan.adapters += bytes;
      plan.gradients += bytes;
      plan.optimizer += t.numel() * 2 * (t.scalar_type() == at::kDouble ? 8 : 4);
    } else {
      plan.weights += bytes;
    }
    if (!t.device().is_cpu()) return;
    const auto at = reinterpret_cast<uintptr_t>(t.storage().data());
    resident += resident_part(at, bytes);
    if (std::any_of(files.begin(), files.end(), [&](const Range& r) { return r.holds(at); }))
      plan.mapped += bytes;
  };
  for (const auto& t : model.parameters()) count(t);
  for (const auto& t : model.buffers()) count(t);
  plan.process = std::max<int64_t>(0, resident_now() - resident);
  plan.activations = model.kept_bytes(tokens);
  plan.workspace = model.passing_bytes(tokens);
  return plan;
}

}  // namespace budwood::train
