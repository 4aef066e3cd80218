#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/method.h>
#include <budwood/peft/methods/peqa.h>
#include <budwood/peft/methods/peqa_config.h>
#include <budwood/peft/ops/affine_linear.h>
#include <budwood/quant/error.h>

namespace budwood {
namespace {

void require_affine(const quant::Weight& weight, const std::string& what) {
  if (ops::is_affine(weight)) return;
  const auto form = weight.packed() ? quant::form_of(weight.format).name() : "plain";
  throw Error("inject", fmt::format("PEQA trains the scales of integer weights, and {} is {}: "
                                    "quantise the model to int4 or int8 in groups, or take a GPTQ "
                                    "or AWQ model",
                                    what, form));
}

}  // namespace

Peqa::Peqa(std::shared_ptr<const PeqaConfig> config, const LinearBase& base,
           const std::string& path)
    : LinearAdapter(config) {
  require_affine(base.weight, path);
  const auto& parts = base.weight.parts;
  scales_ = register_parameter("peqa_scales", parts[1].detach().to(at::kFloat, false, true));
  if (config->train_zeros)
    zeros_ = register_parameter("peqa_zeros", parts[2].detach().to(at::kFloat, false, true));
}

LinearTerm Peqa::term(const LinearBase& base) const {
  require_affine(base.weight, "the weight under it");
  LinearTerm term{.scales = scales_, .zeros = zeros_};
  const auto moved = [&](const at::Tensor& now, const at::Tensor& first) {
    const auto start = first.to(at::kFloat);
    return start + weight() * (now - start);
  };
  if (weight() != 1.0) {
    term.scales = moved(scales_, base.weight.parts[1]);
    if (zeros_.defined()) term.zeros = moved(zeros_, base.weight.parts[2]);
  }
  term.rescaled = ops::with_scales(base.weight, term.scales, term.zeros);
  return term;
}

AdapterState Peqa::state() const {
  AdapterState tensors = {{"peqa_scales", scales_}};
  if (zeros_.defined()) tensors.emplace_back("peqa_zeros", zeros_);
  return tensors;
}

namespace {

std::vector<Grafted> make(const std::shared_ptr<const AdapterConfig>& config,
                          const std::vector<Place>& places, uint64_t) {
  const auto own = own_config<PeqaConfig>(config);
  std::vector<Grafted> made;
  for (size_t i = 0; i < places.size(); ++i) {
    require_kind(places[i], SlotKind::linear, "PEQA");
    made.push_back({i, std::make_shared<Peqa>(own, places[i].base, places[i].path)});
  }
  return made;
}

const bool registered = register_method("PEQA", {.make = make});

}  // namespace
}  // namespace budwood
