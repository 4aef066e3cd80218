#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/method.h>
#include <budwood/peft/methods/adalora.h>
#include <budwood/peft/methods/adalora_config.h>
#include <budwood/quant/error.h>
#include <algorithm>

namespace budwood {

AdaLora::AdaLora(std::shared_ptr<const AdaLoraConfig> config, const LinearBase& base,
                 const std::string& path, uint64_t seed)
    : LinearAdapter(config) {
  int64_t rank = config->init_r;
  const auto kept = config->kept_by_path();
  if (const auto it = kept.find(path); it != kept.end()) {
    if (static_cast<int64_t>(it->second.size()) != config->init_r)
      throw Error("inject", fmt::format("rank_pattern of '{}' has {} entries, and init_r is {}",
                                        path, it->second.size(), config->init_r));
    rank = std::count(it->second.begin(), it->second.end(), true);
  }
  auto generator = stream(seed);
  const auto normal = [&](int64_t rows, int64_t columns) {
    return at::empty({rows, columns}, at::kFloat).normal_(0.0, 0.02, generator);
  };
  lora_a_ = register_parameter("lora_A", normal(rank, base.weight.in));
  lora_b_ = register_parameter("lora_B", normal(base.weight.out, rank));
  lora_e_ = register_parameter(
      "lora_E", config->identity_init() ? at::zeros({rank, 1}, at::kFloat) : normal(rank, 1));
  for (const auto& p : {lora_a_, lora_b_, lora_e_}) {
    importance_.push_back(at::zeros_like(p).detach());
    uncertainty_.push_back(at::zeros_like(p).detach());
  }
  kept_ = at::ones({rank}, at::kBool);
  final_ = at::zeros({}, at::kBool);
}

bool AdaLora::is_final() const {
  return final_.item<bool>();
}

const AdaLoraConfig& AdaLora::own() const {
  return static_cast<const AdaLoraConfig&>(*config());
}

double AdaLora::scaling() const {
  return own().scale();
}

LinearTerm AdaLora::term(const LinearBase&) const {
  return {.a = lora_e_ * lora_a_,
          .b = lora_b_,
          .scaling = scaling(),
          .dropout = is_training() ? own().lora_dropout : 0.0};
}

AdapterState AdaLora::state() const {
  if (!is_final()) return {{"lora_A", lora_a_}, {"lora_B", lora_b_}, {"lora_E", lora_e_}};
  const auto chosen = kept_.nonzero().flatten();
  return {{"lora_A", lora_a_.detach().index_select(0, chosen)},
          {"lora_B", lora_b_.detach().index_select(1, chosen)},
          {"lora_E", lora_e_.detach().index_select(0, chosen)}};
}

AdapterState AdaLora::training_state() const {
  auto all = averages();
  all.emplace_back("kept", kept_);
  all.emplace_back("final", final_);
  return all;
}

AdapterState AdaLora::private_state() const {
  return is_final() ? AdapterState() : averages();
}

AdapterState AdaLora::averages() const {
  AdapterState all;
  const char* names[] = {"A", "B", "E"};
  for (size_t i = 0; i < 3; ++i) {
    all.emplace_back(fmt::format("importance_{}", names[i]), importance_[i]);
    all.emplace_back(fmt::format("uncertainty_{}", names[i]), uncertainty_[i]);
  }
  return all;
}

void AdaLora::describe(AdapterConfig& saved, const std::string& path) const {
  if (!is_final()) return;
  auto& config = static_cast<AdaLoraConfig&>(saved);
  auto all = config.kept_by_path();
  auto& flags = all[path];
  flags.clear();
  for (int64_t i = 0; i < kept_.size(0); ++i) flags.push_back(kept_[i].item<bool>());
  config.set_kept(all);
}

std::string AdaLora::trained_bias() const {
  return own().bias;
}

std::vector<at::Tensor> AdaLora::departures() const {
  const auto eye = at::eye(lora_a_.size(0), lora_a_.options());
  return {(lora_a_.mm(lora_a_.t()) - eye).norm(), (lora_b_.t().mm(lora_b_) - eye).norm()};
}

void AdaLora::measure() {
  at::NoGradGuard no_grad;
  const at::Tensor parameters[] = {lora_a_, lora_b_, lora_e_};
  for (size_t i = 0; i < 3; ++i) {
    if (!parameters[i].grad().defined()) continue;
    const auto now = (parameters[i] * parameters[i].grad()).abs();
    importance_[i].mul_(own().beta1).add_(now, 1 - own().beta1);
    uncertainty_[i].mul_(own().beta2).add_((now - importance_[i]).abs(), 1 - own().beta2);
  }
}

at::Tensor AdaLora::scores() const {
  const auto score = [&](size_t i) { return importance_[i] * uncertainty_[i]; };
  return score(2).flatten() + score(0).mean(1) + score(1).mean(0);
}

void AdaLora::keep(const at::Tensor& kept, bool final) {
  kept_.copy_(kept);
  final_.fill_(final);
  mask_again();
}

void AdaLora::mask_again() {
  at::NoGradGuard no_grad;
  lora_e_.masked_fill_(kept_.logical_not().unsqueeze(1), 0.0);
}

int64_t adalora_budget(const AdaLoraConfig& config, int64_t places, int64_t t) {
  const int64_t first = config.init_r * places, last = config.target_r * places;
  const int64_t end = *config.total_step - config.tfinal;
  if (t <= config.tinit) return first;
  if (t > end) return last;
  const double left =
      1.0 - static_cast<double>(t - config.tinit) / static_cast<double>(end - config.tinit);
  return static_cast<int64_t>(static_cast<double>(first - last) * left * left * left +
                              static_cast<double>(last));
}

namespace {

std::vector<Grafted> make(const std::shared_ptr<const AdapterConfig>& config,
                          const std::vector<Place>& places, uint64_t) {
  const auto own = own_config<AdaLoraConfig>(config);
  std::vector<Grafted> made;
  for (size_t i = 0; i < places.size(); ++i) {
    require_kind(places[i], SlotKind::linear, "ADALORA");
    made.push_back(
        {i, std::make_shared<AdaLora>(own, places[i].base, places[i].path, places[i].seed)});
  }
  return made;
}

AdaLora& as_own(const std::shared_ptr<Adapter>& adapter) {
  return static_cast<AdaLora&>(*adapter);
}

at::Tensor penalty(const Adapters& adapters) {
  const auto& config = static_cast<const AdaLoraConfig&>(*adapters[0]->config());
  if (config.orth_reg_weight == 0) return {};
  std::vector<at::Tensor> norms;
  for (const auto& adapter : adapters)
    for (const auto& norm : as_own(adapter).departures()) norms.push_back(norm);
  return at::stack(norms).mean() * config.orth_reg_weight;
}

void allocate(const Adapters& adapters, int64_t budget, bool final) {
  std::vector<at::Tensor> all;
  for (const auto& adapter : adapters) all.push_back(as_own(adapter).scores());
  const auto scores = at::cat(all);
  const int64_t cut = scores.size(0) - budget;
  // The cut-th smallest and what is not above it goes; with nothing to cut everything stays.
  const double threshold = cut > 0 ? std::get<0>(scores.kthvalue(cut)).item<double>() : -1.0;
  for (size_t i = 0; i < adapters.size(); ++i)
    as_own(adapters[i]).keep(all[i].gt(threshold), final);
}

void after_step(const Adapters& adapters, int64_t t) {
  const auto& config = static_cast<const AdaLoraConfig&>(*adapters[0]->config());
  if (adapters[0]->rank() != config.init_r) return;  // read from a file with final ranks
  const auto places = static_cast<int64_t>(adapters.size());
  const int64_t end = *config.total_step - config.tfinal;
  if (t > end) {
    for (const auto& adapter : adapters) as_own(adapter).mask_again();
    return;
  }
  if (t < end)
    for (const auto& adapter : adapters) as_own(adapter).measure();
  const bool scheduled = t > config.tinit && t % config.deltaT == 0;
  if (scheduled || t == end) allocate(adapters, adalora_budget(config, places, t), t == end);
}

const bool registered =
    register_method("ADALORA", {.make = make, .penalty = penalty, .after_step = after_step});

}  // namespace
}  // namespace budwood
