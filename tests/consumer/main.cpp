// A program of somebody who installed Budwood: adapts one layer, trains a step, merges.
#include <torch/torch.h>

#include <budwood/peft/inject.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/slot.h>
#include <budwood/version.h>
#include <iostream>

int main() {
  torch::manual_seed(0);
  torch::nn::Module model;
  budwood::LinearSlot layer = model.register_module(
      "proj", budwood::LinearSlot(budwood::quant::Weight::dense(torch::randn({6, 4}))));
  auto config = std::make_shared<budwood::LoraConfig>();
  config->r = 2;
  config->target_modules = std::vector<std::string>{"proj"};
  const auto report = budwood::inject(model, config);

  const auto x = torch::randn({3, 4}), before = layer(x);
  std::vector<torch::Tensor> trained;
  for (const auto& [path, p] : budwood::trainable_parameters(model)) trained.push_back(p);
  torch::optim::SGD optimizer(trained, 0.01);
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    layer(x).square().sum().backward();
    optimizer.step();
  }
  const auto after = layer(x);
  budwood::merge(model);
  const bool merged = torch::allclose(layer(x), after, 1e-5, 1e-5);
  std::cout << "budwood " << BUDWOOD_VERSION << ": " << report.places.size() << " place, "
            << report.trainable << " trainable parameters, moved "
            << (after - before).abs().max().item<float>() << ", merged "
            << (merged ? "equal" : "DIFFERENT") << "\n";
  return merged && trained.size() == 2 && !torch::equal(before, after) ? 0 : 1;
}
