// The C++ contender of step.py: training steps on random tokens, no Python.
//   benchmark_step MODEL CONFIG nf4|dense DTYPE BATCH LENGTH STEPS THREADS CHECKPOINT ACTIVATIONS
// CONFIG is the text of an adapter_config.json, ACTIVATIONS the dtype they are kept in. 16-bit
// weights of a float32 run are used as they lie in the file.
// Prints {"seconds": of the steps after the first, "loss": of the first, "peak_mb": at the end}.
#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <budwood/peft/config.h>
#include <budwood/peft/inject.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/ops/kept.h>
#include <budwood/peft/optim/optimizer.h>
#include <budwood/quant/memory_pool.h>
#include <chrono>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

namespace {

double peak_mb() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (word == "VmHWM:") {
      double kilobytes = 0;
      status >> kilobytes;
      return kilobytes / 1024;
    }
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  const std::vector<std::string> given(argv + 1, argv + argc);
  if (given.size() != 10) {
    std::cerr << "usage: benchmark_step MODEL CONFIG nf4|dense DTYPE BATCH LENGTH STEPS THREADS "
                 "CHECKPOINT ACTIVATIONS\n";
    return 2;
  }
  const bool nf4 = given[2] == "nf4";
  const int64_t rows = std::stoll(given[4]), length = std::stoll(given[5]);
  const int steps = std::stoi(given[6]);
  at::set_num_threads(std::stoi(given[7]));

  auto model = budwood::models::load(
      given[0],
      {.dtype = given[3], .weights = "packed", .quantize = nf4 ? "nf4" : "", .double_quant = nf4});
  budwood::inject(*model, budwood::parse_adapter_config(given[1], budwood::Strictness::lenient));
  model->train();
  model->set_checkpointing(std::stoll(given[8]));
  const budwood::ops::ScopedKeptType kept(given[9] == "bfloat16" ? at::kBFloat16 : at::kFloat);

  auto generator = at::make_generator<at::CPUGeneratorImpl>(0);
  const auto ids = at::randint(0, model->config().vocab_size, {rows, length}, generator,
                               at::TensorOptions().dtype(at::kLong));
  auto labels = at::full_like(ids, -100);
  labels.slice(1, 0, length - 1).copy_(ids.slice(1, 1, length));
  const auto batch = budwood::models::TokenBatch::from_rows(ids);
  labels = labels.flatten();
  budwood::optim::Optimizer optimizer(budwood::trainable_parameters(*model),
                                      budwood::optim::make_rule("adamw", {.weight_decay = 0.01}));

  const budwood::quant::MemoryPool pool;
  nlohmann::json result = {{"seconds", nlohmann::json::array()}};
  for (int i = 0; i <= steps; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    const auto loss = model->loss(batch, labels);
    const auto mean = loss.sum / loss.count;
    mean.backward();
    optimizer.step(1e-4);
    optimizer.zero_grad();
    const auto value = mean.item<double>();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    if (i == 0)
      result["loss"] = value;
    else
      result["seconds"].push_back(took.count());
  }
  result["peak_mb"] = peak_mb();
  std::cout << result.dump() << "\n";
} catch (const std::exception& e) {
  std::cerr << e.what() << "\n";
  return 1;
}
