#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/combine.h>
#include <budwood/peft/fold.h>
#include <budwood/peft/lora_folder.h>
#include <budwood/peft/merge/adapter_file.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/svd.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <set>

namespace budwood {
namespace {

// D = B A in fp64, the scaling and the weight in B.
struct Factors {
  at::Tensor a, b;
};

// ||B A|| without the product.
double norm_of(const Factors& f) {
  const auto gram = f.b.t().mm(f.b) * f.a.mm(f.a.t());
  return std::sqrt(std::max(0.0, gram.sum().item<double>()));
}

Factors beside(const std::vector<Factors>& all) {
  std::vector<at::Tensor> a, b;
  for (const auto& one : all) {
    a.push_back(one.a);
    b.push_back(one.b);
  }
  return {at::cat(a), at::cat(b, 1)};
}

// Both factors share the singular values.
Factors from_triplets(const Triplets& t) {
  const auto root = t.s.sqrt();
  return {root.unsqueeze(1) * t.vt, t.u * root};
}

// The best factors of a rank, through a matrix of the size of both ranks.
Factors truncated(const Factors& f, int64_t rank) {
  const auto [qb, rb] = at::linalg_qr(f.b);
  const auto [qa, ra] = at::linalg_qr(f.a.t());
  const auto [u, s, vt] = at::linalg_svd(rb.mm(ra.t()), /*full_matrices=*/false);
  rank = std::min(rank, s.size(0));
  return from_triplets(
      {qb.mm(u.narrow(1, 0, rank)), s.narrow(0, 0, rank), vt.narrow(0, 0, rank).mm(qa.t())});
}

// HF PEFT's: the root of a scale on either side, its sign on one.
Factors summed(const std::vector<Factors>& all, const std::vector<double>& scales,
               const std::string& path) {
  Factors sum;
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].a.size(0) != all[0].a.size(0))
      throw Error("combine", fmt::format("linear sums factors of equal rank, found {} and {} at "
                                         "'{}': use cat or svd",
                                         all[0].a.size(0), all[i].a.size(0), path));
    const double root = std::sqrt(std::abs(scales[i]));
    // B has the scale already.
    const auto b = root > 0 ? all[i].b / scales[i] * root : all[i].b * 0;
    const auto a = all[i].a * std::copysign(root, scales[i]);
    sum.a = sum.a.defined() ? sum.a + a : a;
    sum.b = sum.b.defined() ? sum.b + b : b;
  }
  return sum;
}

at::Tensor largest_part(const at::Tensor& delta, double density) {
  const auto kept = static_cast<int64_t>(density * static_cast<double>(delta.numel()));
  auto mask = at::zeros({delta.numel()}, delta.options());
  if (kept > 0) mask.index_fill_(0, std::get<1>(delta.abs().flatten().topk(kept)), 1.0);
  return delta * mask.view(delta.sizes());
}

at::Tensor agreeing(const at::Tensor& deltas) {
  const auto sum = deltas.sum(0);
  const auto sign = at::where(sum >= 0, at::ones_like(sum), -at::ones_like(sum));
  const auto agrees = (deltas.sign() == sign).to(at::kDouble);
  return (deltas * agrees).sum(0) / agrees.sum(0).clamp_min(1.0);
}

// ties and dare act on the change itself: on factors they would have cross terms.
Factors trimmed(const std::vector<Factors>& all, const CombineOptions& options, int64_t rank,
                at::Generator& generator) {
  std::vector<at::Tensor> deltas;
  for (const auto& one : all) {
    const auto delta = one.b.mm(one.a);
    if (options.mode == "ties") {
      deltas.push_back(largest_part(delta, options.density));
    } else {
      const auto kept = at::empty_like(delta).bernoulli_(options.density, generator);
      deltas.push_back(delta * kept / options.density);
    }
  }
  const auto stacked = at::stack(deltas);
  const auto result = options.mode == "dare" ? stacked.sum(0) : agreeing(stacked);
  return from_triplets(leading_triplets(result, rank));
}

void check(const CombineOptions& options) {
  static const std::set<std::string> modes = {"cat", "svd", "linear", "ties", "dare", "dare_ties"};
  if (!modes.contains(options.mode))
    throw Error("combine",
                fmt::format("mode is one of {}, found '{}'", fmt::join(modes, ", "), options.mode));
  if (options.adapters.empty()) throw Error("combine", "no adapter is given");
  if (options.rank < 0) throw Error("combine", fmt::format("the rank is {}", options.rank));
  if (options.rank > 0 && (options.mode == "cat" || options.mode == "linear"))
    throw Error("combine", fmt::format("{} has the rank that the adapters give it; svd takes a "
                                       "rank",
                                       options.mode));
  if (!(options.density > 0 && options.density <= 1))
    throw Error("combine", fmt::format("density is in (0, 1], found {}", options.density));
}

const LoraConfig& plain_lora(const AdapterFile& adapter) {
  const auto refuse = [&](const std::string& what) {
    throw Error("combine", fmt::format("{} {}, which cannot be combined; merge it on its own",
                                       adapter.folder().string(), what));
  };
  if (adapter.config().peft_type != "LORA") refuse("is " + adapter.config().peft_type);
  const auto& config = static_cast<const LoraConfig&>(adapter.config());
  if (config.use_dora) refuse("is DoRA (use_dora)");
  if (config.lora_bias) refuse("has a bias in B (lora_bias)");
  if (config.principal_init()) refuse("started from a part of its base (init_lora_weights)");
  if (!adapter.token_rows().empty()) refuse("holds rows of tokens (trainable_token_indices)");
  for (const auto& [name, tensor] : adapter.whole()) {
    // Tables that PEFT stores beside adapted ones are the base's.
    if (!tensor->name.ends_with(".base_layer.weight")) refuse("holds " + name + " whole");
  }
  return config;
}

}  // namespace

CombineReport combine(const CombineOptions& options) {
  check(options);
  at::NoGradGuard no_grad;
  std::vector<std::unique_ptr<AdapterFile>> adapters;
  std::vector<const LoraConfig*> configs;
  std::map<std::string, bool> modules;
  CombineReport report;
  for (const auto& source : options.adapters) {
    adapters.push_back(std::make_unique<AdapterFile>(AdapterFile::open(source.path)));
    configs.push_back(&plain_lora(*adapters.back()));
    modules.insert(adapters.back()->modules().begin(), adapters.back()->modules().end());
    if (configs.back()->base_model_name_or_path != configs[0]->base_model_name_or_path)
      report.warnings.push_back(fmt::format("{} names another base model than {}",
                                            source.path.string(),
                                            options.adapters[0].path.string()));
  }
  auto generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
  std::vector<LoraModule> factors;
  for (const auto& [path, table] : modules) {
    std::vector<Factors> all;
    std::vector<double> scales;
    int64_t most = 0;
    for (size_t i = 0; i < adapters.size(); ++i) {
      if (!adapters[i]->modules().contains(path)) continue;
      const auto term = adapters[i]->term(path);
      scales.push_back(options.adapters[i].weight * term.scaling);
      all.push_back({wide(term.a), wide(term.b) * scales.back()});
      most = std::max(most, term.a.shape[0]);
      if (all.back().a.size(1) != all[0].a.size(1) || all.back().b.size(0) != all[0].b.size(0))
        throw Error("combine",
                    fmt::format("'{}' is [{}, {}] for one adapter and [{}, {}] for {}", path,
                                all[0].b.size(0), all[0].a.size(1), all.back().b.size(0),
                                all.back().a.size(1), options.adapters[i].path.string()));
    }
    const auto whole = beside(all);
    const int64_t rank = options.rank > 0 ? options.rank : most;
    Factors made = options.mode == "cat"      ? whole
                   : options.mode == "svd"    ? truncated(whole, rank)
                   : options.mode == "linear" ? summed(all, scales, path)
                                              : trimmed(all, options, rank, generator);
    const auto a = made.a.to(at::kFloat).contiguous(), b = made.b.to(at::kFloat).contiguous();
    const Factors rest = beside({{a.to(at::kDouble), b.to(at::kDouble)}, {whole.a, -whole.b}});
    const double norm = norm_of(whole);
    report.modules.push_back({path, a.size(0), norm, norm > 0 ? norm_of(rest) / norm : 0.0});
    factors.push_back({.path = path, .a = to_array(a), .b = to_array(b), .table = table});
  }

  auto config = std::make_shared<LoraConfig>();
  std::vector<std::string> paths;
  for (const auto& module : report.modules) paths.push_back(module.path);
  // A list of names says the same again only where nothing else narrows it down.
  const bool same = std::holds_alternative<std::vector<std::string>>(configs[0]->target_modules) &&
                    std::holds_alternative<std::monostate>(configs[0]->layers_to_transform) &&
                    std::holds_alternative<std::monostate>(configs[0]->exclude_modules) &&
                    std::all_of(adapters.begin(), adapters.end(),
                                [&](const auto& one) { return one->modules() == modules; });
  config->target_modules = same ? configs[0]->target_modules : Names(paths);
  config->fan_in_fan_out = configs[0]->fan_in_fan_out;
  config->base_model_name_or_path = configs[0]->base_model_name_or_path;
  config->task_type = configs[0]->task_type;
  write_lora_folder(options.out, *config, factors, options.overwrite);
  return report;
}

}  // namespace budwood
