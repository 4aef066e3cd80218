#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <budwood/peft/methods/lora.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/models/original_weights.h>
#include <budwood/peft/models/residual_start.h>
#include <budwood/peft/models/running.h>
#include <budwood/quant/calibrate/hessian.h>
#include <budwood/quant/error.h>
#include <map>
#include <memory>

namespace budwood::models {
namespace {

constexpr const char* kWhere = "start_from_original";

struct Place {
  std::string path;
  LinearSlot slot{nullptr};
  std::shared_ptr<Lora> lora;
};

std::vector<Place> places_of(CausalLM& model, const std::string& name) {
  std::vector<Place> places;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto slot = std::dynamic_pointer_cast<LinearSlotImpl>(item.value());
    const auto adapter = slot ? slot->adapter(name) : nullptr;
    if (!adapter || adapter->companion()) continue;
    auto lora = std::dynamic_pointer_cast<Lora>(adapter);
    const auto* config = lora ? dynamic_cast<const LoraConfig*>(lora->config().get()) : nullptr;
    if (config == nullptr || !lora->starts_as_identity() || !lora->composes() ||
        config->use_qalora || !lora->private_state().empty())
      throw Error(kWhere,
                  fmt::format("the adapter at {} is no plain LoRA that begins with 0: DoRA, "
                              "PiSSA, OLoRA, QA-LoRA and other methods have starts of their "
                              "own",
                              item.key()));
    if (!slot->weight().packed())
      throw Error(kWhere,
                  fmt::format("{} is not quantised: nothing was taken from it", item.key()));
    places.push_back({item.key(), LinearSlot(slot), std::move(lora)});
  }
  if (places.empty())
    throw Error(kWhere, fmt::format("the model has no LoRA adapter '{}' on a projection", name));
  return places;
}

class Starter {
 public:
  Starter(CausalLM& model, const std::filesystem::path& original, const StartOptions& options)
      : original_(original), options_(options), places_(places_of(model, options.adapter)) {}

  StartReport each() {
    for (auto& place : places_) start(place, {});
    return std::move(report_);
  }

  StartReport by_blocks(CausalLM& model) {
    std::map<const LinearSlotImpl*, Place*> by_slot;
    for (auto& place : places_) by_slot[place.slot.get()] = &place;
    auto running = start_running(model, options_.sequences, options_.batch_tokens);
    for (const auto& block : model.blocks()) {
      start_block(block, running, by_slot);
      for (auto& [batch, x] : running) x = block.forward(x, batch);
    }
    return std::move(report_);
  }

 private:
  void start(Place& place, const at::Tensor& covariance) {
    auto& slot = *place.slot;
    const auto start =
        residual_start(original_.matrix(place.path), slot.weight(), place.lora->rank(),
                       place.lora->scaling(), options_.residual, covariance);
    const auto parameters = place.lora->named_parameters();
    auto a = parameters["lora_A"], b = parameters["lora_B"];
    a.copy_(start.a);
    b.copy_(start.b);
    if (start.base) {
      slot.replace_weight(*start.base);
      report_.base_changed = true;
    }
    report_.places.push_back(
        {place.path, place.lora->rank(), start.before, start.after, start.iteration});
    if (options_.progress)
      options_.progress(static_cast<int64_t>(report_.places.size()),
                        static_cast<int64_t>(places_.size()), place.path);
  }

  void start_block(const Block& block, const std::vector<Running>& running,
                   const std::map<const LinearSlotImpl*, Place*>& by_slot) {
    std::vector<std::pair<Place*, std::unique_ptr<quant::calibrate::HessianSum>>> seen;
    std::vector<std::unique_ptr<Observation>> observations;
    for (const auto& group : block.groups)
      for (const auto& projection : group.projections) {
        const auto it = by_slot.find(projection.slot.get());
        if (it == by_slot.end()) continue;
        auto sum = std::make_unique<quant::calibrate::HessianSum>(projection.slot->in_features());
        observations.push_back(std::make_unique<Observation>(
            projection.slot, [sum = sum.get()](const at::Tensor& x) { sum->add(x); }));
        seen.emplace_back(it->second, std::move(sum));
      }
    if (seen.empty()) return;
    for (const auto& [batch, x] : running) block.forward(x, batch);
    observations.clear();
    for (auto& [place, sum] : seen) start(*place, sum->mean());
  }

  OriginalWeights original_;
  const StartOptions& options_;
  std::vector<Place> places_;
  StartReport report_;
};

}  // namespace

StartReport start_from_original(CausalLM& model, const std::filesystem::path& original,
                                const StartOptions& options) {
  const at::NoGradGuard no_grad;
  options.residual.validate();
  const bool looks = options.residual.method == "eora";
  if (looks && options.sequences.empty())
    throw Error(kWhere, "eora looks at data: wanted at least one sequence");
  Starter starter(model, original, options);
  return looks ? starter.by_blocks(model) : starter.each();
}

}  // namespace budwood::models
