#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>

#include <budwood/peft/method.h>
#include <budwood/peft/methods/lora.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/slot.h>
#include <budwood/quant/error.h>
#include <cmath>

namespace budwood {
namespace {

at::Tensor initial_a(const LoraConfig& config, int64_t rank, int64_t in, at::Generator generator) {
  auto a = at::empty({rank, in}, at::kFloat);
  if (config.gaussian_init()) return a.normal_(0.0, 1.0 / static_cast<double>(rank), generator);
  const double bound = 1.0 / std::sqrt(static_cast<double>(in));
  return a.uniform_(-bound, bound, generator);
}

}  // namespace

Lora::Lora(std::shared_ptr<const LoraConfig> config, const LinearSlotImpl& slot,
           const std::string& path, uint64_t seed)
    : LinearAdapter(config), scaling_(config->scaling(path)), dropout_(config->lora_dropout) {
  const int64_t rank = config->rank(path);
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  auto a = initial_a(*config, rank, slot.in_features(), generator);
  auto b = at::zeros({slot.out_features(), rank}, at::kFloat);
  // init_lora_weights=False asks for a start that is not the identity; only tests want it.
  if (!config->identity_init()) b.normal_(0.0, 0.02, generator);
  lora_a_ = register_parameter("lora_A", a);
  lora_b_ = register_parameter("lora_B", b);
  if (config->lora_bias)
    bias_ = register_parameter("lora_B_bias", at::zeros({slot.out_features()}, at::kFloat));
}

std::optional<LowRank> Lora::low_rank() const {
  if (bias_.defined() || (is_training() && dropout_ > 0)) return {};
  return LowRank{lora_a_, lora_b_, scaling_};
}

at::Tensor Lora::forward(const LinearSlotImpl&, const at::Tensor& x, at::Tensor y) {
  auto input = x.to(lora_a_.scalar_type());
  if (is_training() && dropout_ > 0) input = at::dropout(input, dropout_, /*train=*/true);
  auto term = at::linear(at::linear(input, lora_a_), lora_b_);
  if (bias_.defined()) term = term + bias_;
  return y + (term * scaling_).to(y.scalar_type());
}

at::Tensor Lora::merge_rows(const at::Tensor& rows, int64_t begin) const {
  const auto b = lora_b_.narrow(0, begin, rows.size(0)).to(at::kDouble);
  return rows.addmm(b, lora_a_.to(at::kDouble), 1, scaling_);
}

at::Tensor Lora::merge_bias(const at::Tensor& bias) const {
  if (!bias_.defined()) return bias;
  const auto own = bias_.detach().to(at::kDouble) * scaling_;
  if (!bias.defined()) return own.to(at::kFloat);
  return (bias.detach().to(at::kDouble) + own).to(bias.scalar_type());
}

AdapterState Lora::state() const {
  AdapterState tensors = {{"lora_A.weight", lora_a_}, {"lora_B.weight", lora_b_}};
  if (bias_.defined()) tensors.emplace_back("lora_B.bias", bias_);
  return tensors;
}

std::string Lora::trained_bias() const {
  return static_cast<const LoraConfig&>(*config()).bias;
}

namespace {

const bool registered = register_method(
    "LORA",
    {.linear = [](std::shared_ptr<const AdapterConfig> config, const LinearSlotImpl& slot,
                  const std::string& path, uint64_t seed) -> std::shared_ptr<LinearAdapter> {
      auto own = std::dynamic_pointer_cast<const LoraConfig>(config);
      if (!own) throw Error("inject", "a configuration of peft_type LORA is a LoraConfig");
      return std::make_shared<Lora>(std::move(own), slot, path, seed);
    }});

}  // namespace
}  // namespace budwood
