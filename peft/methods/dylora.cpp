#include <ATen/ATen.h>

#include <budwood/peft/method.h>
#include <budwood/peft/methods/dylora.h>
#include <budwood/peft/methods/dylora_config.h>
#include <cmath>

namespace budwood {

DyLora::DyLora(std::shared_ptr<const DyLoraConfig> config, const LinearBase& base,
               std::shared_ptr<int64_t> drawn, uint64_t seed)
    : LinearAdapter(config), drawn_(std::move(drawn)) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(base.weight.in));
  lora_a_ = register_parameter(
      "lora_A",
      at::empty({config->r, base.weight.in}, at::kFloat).uniform_(-bound, bound, stream(seed)));
  lora_b_ = register_parameter("lora_B", at::zeros({base.weight.out, config->r}, at::kFloat));
}

const DyLoraConfig& DyLora::own() const {
  return static_cast<const DyLoraConfig&>(*config());
}

void DyLora::draw(int64_t step) {
  // A function of the seed and the step alone, so that a resumed run draws what it would have.
  auto generator =
      stream(static_cast<uint64_t>(own().rank_seed) * 1000003u + static_cast<uint64_t>(step));
  *drawn_ = at::randint(own().r_min, own().r + 1, {1}, generator, at::kLong).item<int64_t>();
}

LinearTerm DyLora::term(const LinearBase&) const {
  const int64_t usual = own().eval_rank > 0 ? own().eval_rank : own().r;
  const int64_t rank = is_training() ? *drawn_ : usual;
  auto a = lora_a_.narrow(0, 0, rank);
  auto b = lora_b_.narrow(1, 0, rank);
  if (is_training() && own().frozen && rank > 1) {
    a = at::cat({a.narrow(0, 0, rank - 1).detach(), a.narrow(0, rank - 1, 1)});
    b = at::cat({b.narrow(1, 0, rank - 1).detach(), b.narrow(1, rank - 1, 1)}, 1);
  }
  return {.a = a,
          .b = b,
          .scaling = own().lora_alpha / static_cast<double>(rank),
          .dropout = is_training() ? own().lora_dropout : 0.0};
}

AdapterState DyLora::state() const {
  return {{"lora_A.weight", lora_a_}, {"lora_B.weight", lora_b_}};
}

namespace {

std::vector<Grafted> make(const std::shared_ptr<const AdapterConfig>& config,
                          const std::vector<Place>& places, uint64_t) {
  const auto own = own_config<DyLoraConfig>(config);
  const auto drawn = std::make_shared<int64_t>(own->r);
  std::vector<Grafted> made;
  for (size_t i = 0; i < places.size(); ++i) {
    require_kind(places[i], SlotKind::linear, "DYLORA");
    made.push_back({i, std::make_shared<DyLora>(own, places[i].base, drawn, places[i].seed)});
  }
  return made;
}

void before_step(const Adapters& adapters, int64_t step) {
  static_cast<DyLora&>(*adapters[0]).draw(step);
}

const bool registered = register_method("DYLORA", {.make = make, .before_step = before_step});

}  // namespace
}  // namespace budwood
