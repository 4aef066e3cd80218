// LoRA with LibTorch's own optimiser and a loop of one's own:
//   own_loop MODEL TEXT.tokens OUT
// MODEL is a Hugging Face folder or a GGUF file, TEXT.tokens comes from `budwood tokenize`.
#include <torch/torch.h>

#include <budwood/peft/inject.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/train/data.h>
#include <iostream>

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: own_loop MODEL TEXT.tokens OUT\n";
    return 2;
  }
  auto model = budwood::models::load(argv[1], {.dtype = "float32"});

  auto config = std::make_shared<budwood::LoraConfig>();
  config->r = 8;
  config->lora_alpha = 16;
  config->target_modules = "all-linear";
  std::cout << budwood::inject(*model, config).summary() << "\n";

  std::vector<torch::Tensor> parameters;
  for (const auto& [path, p] : budwood::trainable_parameters(*model)) parameters.push_back(p);
  torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(1e-3));

  const auto text = budwood::train::TokenFile::open(argv[2]);
  const auto ids = text->row(0).ids.to(torch::kLong);
  const int64_t length = std::min<int64_t>(64, ids.size(0) - 1);
  model->train();
  for (int step = 0; step < 5; ++step) {
    const auto begin = (step * length) % (ids.size(0) - length);
    const auto batch =
        budwood::models::TokenBatch::from_rows(ids.slice(0, begin, begin + length).unsqueeze(0));
    const auto loss = model->loss(batch, ids.slice(0, begin + 1, begin + length + 1));
    optimizer.zero_grad();
    (loss.sum / loss.count).backward();
    optimizer.step();
    std::cout << "step " << step + 1 << "  loss " << (loss.sum / loss.count).item<float>() << "\n";
  }

  const std::string out = argv[3];
  budwood::save_adapter(*model, out + "/adapter");
  budwood::merge(*model);
  budwood::models::save(*model, out + "/merged", {.tokenizer_from = argv[1]});
  std::cout << "adapter in " << out << "/adapter, merged model in " << out << "/merged\n";
} catch (const std::exception& e) {
  std::cerr << e.what() << "\n";
  return 1;
}
