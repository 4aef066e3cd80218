#include <ATen/ATen.h>

#include <budwood/peft/method.h>
#include <budwood/peft/methods/vera.h>
#include <budwood/peft/methods/vera_config.h>
#include <algorithm>
#include <cmath>

namespace budwood {

Vera::Vera(std::shared_ptr<const VeraConfig> config, const LinearBase& base,
           std::shared_ptr<VeraProjections> shared, bool first, uint64_t seed)
    : LinearAdapter(config), shared_(std::move(shared)), first_(first) {
  auto lambda_b = at::zeros({base.weight.out}, at::kFloat);
  auto lambda_d = at::full({config->r}, config->d_initial, at::kFloat);
  if (!config->init_weights) {
    auto generator = stream(seed);
    lambda_d.normal_(0.0, 1.0, generator);
    lambda_b.normal_(0.0, 1.0, generator);
  }
  lambda_b_ = register_parameter("vera_lambda_b", lambda_b);
  lambda_d_ = register_parameter("vera_lambda_d", lambda_d);
  if (first_) {
    register_buffer("vera_A", shared_->a);
    register_buffer("vera_B", shared_->b);
  }
}

const VeraConfig& Vera::own() const {
  return static_cast<const VeraConfig&>(*config());
}

LinearTerm Vera::term(const LinearBase& base) const {
  LinearTerm term{
      .a = lambda_d_.unsqueeze(1) * shared_->a.narrow(1, 0, base.weight.in),
      .b = lambda_b_.unsqueeze(1) * shared_->b.narrow(0, 0, base.weight.out),
  };
  if (is_training()) term.dropout = own().vera_dropout;
  return term;
}

AdapterState Vera::state() const {
  return {{"vera_lambda_b", lambda_b_}, {"vera_lambda_d", lambda_d_}};
}

AdapterState Vera::shared_state() const {
  if (!first_ || !own().save_projection) return {};
  return {{"base_model.vera_A", shared_->a}, {"base_model.vera_B", shared_->b}};
}

std::string Vera::trained_bias() const {
  return own().bias == "vera_only" ? "lora_only" : own().bias;
}

bool Vera::starts_as_identity() const {
  return own().init_weights;
}

namespace {

std::vector<Grafted> make(const std::shared_ptr<const AdapterConfig>& config,
                          const std::vector<Place>& places, uint64_t) {
  const auto own = own_config<VeraConfig>(config);
  int64_t in = 0, out = 0;
  for (const auto& place : places) {
    require_kind(place, SlotKind::linear, "VERA");
    in = std::max(in, place.base.weight.in);
    out = std::max(out, place.base.weight.out);
  }
  // The same numbers as HF PEFT's, from the same key.
  auto generator = stream(static_cast<uint64_t>(own->projection_prng_key));
  const auto draw = [&](int64_t rows, int64_t columns) {
    const double bound = std::sqrt(6.0 / static_cast<double>(columns));
    return at::empty({rows, columns}, at::kFloat).uniform_(-bound, bound, generator);
  };
  const auto shared = std::make_shared<VeraProjections>();
  shared->a = draw(own->r, in);
  shared->b = draw(out, own->r);
  std::vector<Grafted> made;
  for (size_t i = 0; i < places.size(); ++i)
    made.push_back(
        {i, std::make_shared<Vera>(own, places[i].base, shared, i == 0, places[i].seed)});
  return made;
}

const bool registered = register_method("VERA", {.make = make});

}  // namespace
}  // namespace budwood
