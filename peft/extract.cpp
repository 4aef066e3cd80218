#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/extract.h>
#include <budwood/peft/fold.h>
#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/lora_folder.h>
#include <budwood/peft/merge/base_layout.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/svd.h>
#include <budwood/peft/targets.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

namespace budwood {
namespace {

// Ranks that a search for an energy begins with.
constexpr int64_t kFirstRank = 8;

at::Tensor read(const io::ModelFiles& files, const io::TensorInfo& info) {
  auto tensor = at::empty(info.shape, scalar_type(info.dtype));
  files.read(info, 0, tensor.mutable_data_ptr(), info.bytes());
  return tensor.to(at::kDouble);
}

bool same_bytes(const io::ModelFiles& a, const io::TensorInfo& left, const io::ModelFiles& b,
                const io::TensorInfo& right) {
  if (left.dtype != right.dtype || left.shape != right.shape) return false;
  constexpr uint64_t kPiece = 1 << 20;
  std::vector<std::byte> one(kPiece), two(kPiece);
  for (uint64_t at = 0; at < left.bytes(); at += kPiece) {
    const auto count = static_cast<size_t>(std::min(kPiece, left.bytes() - at));
    a.read(left, at, one.data(), count);
    b.read(right, at, two.data(), count);
    if (!std::equal(one.begin(), one.begin() + static_cast<std::ptrdiff_t>(count), two.begin()))
      return false;
  }
  return true;
}

struct Factors {
  at::Tensor a, b;  // fp32
  double energy = 0;
};

Factors factors_of(const at::Tensor& delta, const ExtractOptions& options) {
  const int64_t most = std::min(delta.size(0), delta.size(1));
  const double whole = delta.square().sum().item<double>();
  Triplets found;
  int64_t rank = std::min(most, options.rank);
  if (options.energy > 0) {
    for (int64_t tried = std::min(kFirstRank, most);; tried = std::min(2 * tried, most)) {
      found = leading_triplets(delta, tried);
      const auto kept = found.s.square().cumsum(0) / whole;
      const auto enough = (kept >= options.energy).nonzero();
      if (enough.size(0) == 0 && tried < most) continue;
      rank = enough.size(0) > 0 ? enough[0].item<int64_t>() + 1 : tried;
      break;
    }
  } else {
    found = leading_triplets(delta, rank);
  }
  const auto s = found.s.narrow(0, 0, rank);
  const auto root = s.sqrt();
  Factors factors;
  factors.b = (found.u.narrow(1, 0, rank) * root).to(at::kFloat).contiguous();
  factors.a = (root.unsqueeze(1) * found.vt.narrow(0, 0, rank)).to(at::kFloat).contiguous();
  factors.energy = whole > 0 ? s.square().sum().item<double>() / whole : 1.0;
  return factors;
}

bool is_target(const std::string& path, bool head, const ExtractOptions& options) {
  if (options.targets.empty()) return !head;
  return std::any_of(options.targets.begin(), options.targets.end(),
                     [&](const auto& name) { return path == name || path.ends_with("." + name); });
}

void check(const ExtractOptions& options) {
  if ((options.rank > 0) == (options.energy > 0))
    throw Error("extract", fmt::format("give a rank of 1 or more, or an energy; found rank {} and "
                                       "energy {}",
                                       options.rank, options.energy));
  if (options.energy > 1)
    throw Error("extract", fmt::format("the energy is in (0, 1], found {}", options.energy));
}

void check_names(const io::ModelFiles& base, const io::ModelFiles& tuned) {
  std::vector<std::string> faults;
  for (const auto* tensor : base.tensors())
    if (!tuned.find(tensor->name))
      faults.push_back(tensor->name + " is missing in the tuned model");
  for (const auto* tensor : tuned.tensors())
    if (!base.find(tensor->name)) faults.push_back(tensor->name + " is missing in the base");
  // A merge may have given a tied head a tensor of its own.
  std::erase_if(faults, [](const auto& fault) { return fault.starts_with("lm_head.weight "); });
  if (!faults.empty())
    throw Error("extract",
                fmt::format("{} and {} are no models of one kind:\n  {}", base.path().string(),
                            tuned.path().string(), fmt::join(faults, "\n  ")));
}

}  // namespace

ExtractReport extract(const ExtractOptions& options) {
  check(options);
  at::NoGradGuard no_grad;
  const PlainBase described(options.base);
  const auto& base = described.files();
  const auto tuned = io::ModelFiles::open(options.tuned, io::Access::headers);
  check_names(base, tuned);
  const BaseLayout layout(described);
  if (!quantization_of(described.config()).empty())
    throw Error("extract", options.base.string() + " is quantised: its plain weights are wanted");

  ExtractReport report;
  auto config = std::make_shared<LoraConfig>();
  std::vector<LoraModule> written;
  std::vector<std::string> extracted, others;
  bool any_target = false;
  std::map<std::string, ModuleInfo> modules;
  for (auto& module : layout.modules()) modules.emplace(module.path + ".weight", module);
  for (const auto* info : base.tensors()) {
    const auto* other = tuned.find(info->name);
    if (other == nullptr) continue;
    const auto it = modules.find(info->name);
    const bool projection = it != modules.end() && it->second.kind != ModuleKind::embedding;
    const bool target =
        projection && is_target(it->second.path, it->second.is_output_embedding, options);
    any_target |= target;
    if (same_bytes(base, *info, tuned, *other)) {
      if (target) report.identical.push_back(it->second.path);
      if (projection) others.push_back(it->second.path);
      continue;
    }
    if (info->shape != other->shape) {
      if (target)
        throw Error("extract",
                    fmt::format("{} is {} in the base and {} in the tuned model", info->name,
                                io::shape_text(info->shape), io::shape_text(other->shape)));
      report.lost.push_back({info->name, std::numeric_limits<double>::quiet_NaN()});
      if (projection) others.push_back(it->second.path);
      continue;
    }
    auto delta = read(tuned, *other) - read(base, *info);
    const double norm = delta.norm().item<double>();
    if (!std::isfinite(norm))
      throw Error("extract", fmt::format("{} holds NaN or infinity", info->name));
    if (!target) {
      report.lost.push_back({info->name, norm});
      if (projection) others.push_back(it->second.path);
      continue;
    }
    if (it->second.kind == ModuleKind::conv1d) delta = delta.t();
    const auto factors = factors_of(delta, options);
    const auto& path = it->second.path;
    const int64_t rank = factors.a.size(0);
    written.push_back({.path = path, .a = to_array(factors.a), .b = to_array(factors.b)});
    extracted.push_back(path);
    report.modules.push_back({path, rank, norm, factors.energy});
    report.parameters += factors.a.numel() + factors.b.numel();
    config->fan_in_fan_out = it->second.kind == ModuleKind::conv1d;
  }
  if (!any_target)
    throw Error("extract", fmt::format("no projection of {} ends in {}", options.base.string(),
                                       fmt::join(options.targets, ", ")));
  if (extracted.empty())
    throw Error("extract",
                "the targets do not differ between the two models: there is nothing to "
                "extract");
  config->target_modules = minimal_suffixes(extracted, others);
  config->base_model_name_or_path = options.base.string();
  if (layout.causal()) config->task_type = "CAUSAL_LM";
  write_lora_folder(options.out, *config, written, options.overwrite);
  return report;
}

}  // namespace budwood
