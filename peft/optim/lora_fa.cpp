#include <ATen/ATen.h>

#include <budwood/peft/methods/lora.h>
#include <budwood/peft/optim/lora_fa.h>
#include <budwood/quant/error.h>

namespace budwood::optim {

LoraFa::LoraFa(torch::nn::Module& model) {
  for (const auto& module : model.modules(/*include_self=*/false)) {
    const auto* lora = dynamic_cast<const Lora*>(module.get());
    if (!lora) continue;
    const auto parameters = lora->named_parameters();
    auto a = parameters["lora_A"];
    const auto& b = parameters["lora_B"];
    if (!b.requires_grad()) continue;
    a.set_requires_grad(false);
    const auto wide = a.detach().to(at::kDouble);
    const auto gram = wide.mm(wide.t());
    gram.diagonal().add_(1e-8);
    const auto s = lora->scaling();
    inverses_.emplace_back(b, (at::linalg_inv(gram) / (s * s)).to(b.scalar_type()));
  }
  if (inverses_.empty())
    throw Error("LoraFa", "the model has no trained LoRA adapter of a projection");
}

void LoraFa::correct_gradients() const {
  at::NoGradGuard no_grad;
  for (const auto& [b, inverse] : inverses_)
    if (b.grad().defined()) b.mutable_grad() = b.grad().mm(inverse);
}

}  // namespace budwood::optim
