#include <ATen/ATen.h>

#include <budwood/peft/method.h>
#include <budwood/peft/methods/ia3.h>
#include <budwood/peft/methods/ia3_config.h>

namespace budwood {

IA3::IA3(std::shared_ptr<const IA3Config> config, const LinearBase& base, bool feedforward,
         uint64_t seed)
    : LinearAdapter(config), feedforward_(feedforward) {
  const auto& w = base.weight;
  auto l = feedforward ? at::ones({1, w.in}, at::kFloat) : at::ones({w.out, 1}, at::kFloat);
  if (!config->init_ia3_weights) l.normal_(0.0, 1.0, stream(seed));
  l_ = register_parameter("ia3_l", l);
}

LinearTerm IA3::term(const LinearBase&) const {
  LinearTerm term;
  (feedforward_ ? term.input_gain : term.gain) = l_.flatten();
  return term;
}

bool IA3::starts_as_identity() const {
  return static_cast<const IA3Config&>(*config()).init_ia3_weights;
}

namespace {

std::vector<Grafted> make(const std::shared_ptr<const AdapterConfig>& config,
                          const std::vector<Place>& places, uint64_t) {
  const auto own = own_config<IA3Config>(config);
  std::vector<Grafted> made;
  for (size_t i = 0; i < places.size(); ++i) {
    require_kind(places[i], SlotKind::linear, "IA3");
    made.push_back({i, std::make_shared<IA3>(own, places[i].base,
                                             own->is_feedforward(places[i].path), places[i].seed)});
  }
  return made;
}

const bool registered = register_method("IA3", {.make = make});

}  // namespace
}  // namespace budwood
