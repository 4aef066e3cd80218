// LoRA with Budwood's Trainer: schedule, evaluation, checkpoints, resume.
//   with_trainer MODEL TEXT.tokens OUT
// MODEL is a Hugging Face folder or a GGUF file, TEXT.tokens comes from `budwood tokenize`.
#include <budwood/peft/inject.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/train/data.h>
#include <budwood/peft/train/signals.h>
#include <budwood/peft/train/trainer.h>
#include <iostream>

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: with_trainer MODEL TEXT.tokens OUT\n";
    return 2;
  }
  const std::string out = argv[3];
  auto model = budwood::models::load(argv[1], {.dtype = "float32"});

  auto config = std::make_shared<budwood::LoraConfig>();
  config->r = 8;
  config->lora_alpha = 16;
  config->target_modules = "all-linear";
  std::cout << budwood::inject(*model, config).summary() << "\n";

  budwood::train::TrainOptions options;
  options.steps = 6;
  options.batch_size = 2;
  options.sequence_length = 64;
  options.packing = "concat";
  options.learning_rate = 1e-3;
  options.log_every = 1;
  options.save_every = 3;
  options.output = out + "/adapter";
  options.resume = "auto";  // goes on where an interrupted run stopped

  const auto text = budwood::train::TokenFile::open(argv[2]);
  budwood::train::Trainer trainer(model, text, text, options);
  trainer.on_log = [](const budwood::train::StepMetrics& m) {
    std::cout << "step " << m.step << "/" << m.total_steps << "  loss " << m.loss << "\n";
  };
  budwood::train::StopOnSignal stop;  // Ctrl-C writes a checkpoint and returns
  const auto result = trainer.run();
  std::cout << "perplexity " << result.evaluation->perplexity << "  peak memory "
            << result.peak_rss_mb << " MB\n";
  if (result.interrupted) return 130;

  budwood::merge(*model);
  budwood::models::save(*model, out + "/merged", {.tokenizer_from = argv[1]});
  std::cout << "adapter in " << out << "/adapter, merged model in " << out << "/merged\n";
} catch (const std::exception& e) {
  std::cerr << e.what() << "\n";
  return 1;
}
