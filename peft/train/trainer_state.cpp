#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <budwood/peft/inject.h>
#include <budwood/peft/json.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/train/run_folder.h>
#include <budwood/peft/train/trainer.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <mutex>
#include <nlohmann/json.hpp>
#include <unordered_map>

// What a Trainer keeps on disk and takes back.
namespace budwood::train {
namespace {

namespace fs = std::filesystem;

at::Tensor generator_state(at::Device device) {
  auto generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard lock(generator.mutex());
  return generator.get_state();
}

void set_generator_state(at::Device device, const at::Tensor& state) {
  auto generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard lock(generator.mutex());
  generator.set_state(state);
}

std::string shown_option(const std::string& options, const std::string& name) {
  const auto json = Json::parse(options);
  return json.contains(name) ? shown(json.at(name)) : "not set";
}

// What adapters keep beside their parameters, by the paths of the adapters.
NamedTensors adapter_state(const torch::nn::Module& model) {
  NamedTensors tensors;
  for (const auto& item : model.named_modules("", /*include_self=*/false))
    if (const auto* adapter = dynamic_cast<const Adapter*>(item.value().get()))
      for (const auto& [name, tensor] : adapter->training_state())
        tensors.emplace_back("adapter." + item.key() + "." + name, tensor);
  return tensors;
}

}  // namespace

NamedTensors Trainer::random_state() const {
  NamedTensors tensors = {{"rng.cpu", generator_state(at::kCPU)}};
  const auto device = device_of(*model_);
  if (!device.is_cpu()) tensors.emplace_back("rng.device", generator_state(device));
  return tensors;
}

void Trainer::set_random_state(const NamedTensors& tensors) const {
  for (const auto& [name, state] : tensors) {
    if (name == "rng.cpu") set_generator_state(at::kCPU, state.clone());
    if (name == "rng.device") set_generator_state(device_of(*model_), state.clone());
  }
}

void Trainer::open_output() {
  if (opened_ || options_.output.empty()) return;
  {
    // The final adapter exchanges the whole folder: what would fail then is to fail now.
    const io::AtomicFolder probe(options_.output, io::Existing::keep_others);
  }
  if (resumed_)
    trim_metrics(options_.output, state_.step, state_.evaluated_step);
  else
    start_run_folder(options_.output, options_.overwrite);
  std::error_code error;
  fs::create_directories(options_.output, error);
  if (error)
    throw Error("Trainer",
                fmt::format("cannot make the folder {}: {}", options_.output, error.message()));
  opened_ = true;
}

void Trainer::resume() {
  if (options_.resume.empty()) return;
  if (options_.resume != "auto") return restore(load_checkpoint(options_.resume));
  if (const auto newest = newest_checkpoint(options_.output, warnings_)) return restore(*newest);
  if (!warnings_.empty())
    throw Error("Trainer", fmt::format("{} holds no checkpoint that is whole: {}", options_.output,
                                       warnings_.back()));
}

void Trainer::restore(const Checkpoint& checkpoint) {
  const auto& saved = checkpoint.state;
  const auto fail = [&](const std::string& fact) {
    throw Error("Trainer", fmt::format("the checkpoint of step {} belongs to another run: {}",
                                       saved.step, fact));
  };
  std::string differing;
  for (const auto& name :
       options_.differences(TrainOptions::from_json(saved.options, "checkpoint")))
    differing += fmt::format("{}{} was {}, now {}", differing.empty() ? "" : "; ", name,
                             shown_option(saved.options, name), shown_option(state_.options, name));
  if (!differing.empty()) fail(differing);
  if (saved.data_rows != state_.data_rows || saved.data_tokens != state_.data_tokens ||
      saved.data_checksum != state_.data_checksum)
    fail(
        fmt::format("its training data had {} rows and {} tokens (checksum {:08x}), this has {} "
                    "rows and {} tokens (checksum {:08x})",
                    saved.data_rows, saved.data_tokens, saved.data_checksum, state_.data_rows,
                    state_.data_tokens, state_.data_checksum));
  if (saved.base != state_.base)
    fail("the frozen weights of its model differ from those of this one");

  std::unordered_map<std::string, at::Tensor> tensors(checkpoint.tensors.begin(),
                                                      checkpoint.tensors.end());
  size_t stored = 0;
  for (const auto& [name, t] : checkpoint.tensors) stored += name.starts_with("parameter.");
  if (stored != updater_->parameters().size())
    fail(fmt::format("it trained {} tensors, this model trains {}", stored,
                     updater_->parameters().size()));
  for (const auto& [path, p] : updater_->parameters()) {
    const auto it = tensors.find("parameter." + path);
    if (it == tensors.end()) fail(fmt::format("it did not train {}", path));
    if (it->second.sizes() != p.sizes() || it->second.scalar_type() != p.scalar_type())
      fail(fmt::format("{} has another shape or dtype", path));
  }
  NamedTensors random;
  for (const auto& own : random_state()) {
    const auto it = tensors.find(own.first);
    if (it == tensors.end() || it->second.sizes() != own.second.sizes())
      fail(
          fmt::format("it has no fitting {}: it was trained on another kind of device, or with "
                      "another version of torch",
                      own.first));
    random.emplace_back(own.first, it->second.clone());
  }
  for (const auto& [name, own] : adapter_state(*model_)) {
    const auto it = tensors.find(name);
    if (it == tensors.end() || it->second.sizes() != own.sizes())
      fail(fmt::format("it has no fitting {}", name));
  }
  sampler_.restore(saved.position);
  updater_->restore(checkpoint.tensors);
  at::NoGradGuard no_grad;
  for (const auto& [path, p] : updater_->parameters()) p.copy_(tensors.at("parameter." + path));
  for (auto& [name, own] : adapter_state(*model_)) own.copy_(tensors.at(name));
  random_ = std::move(random);

  const auto now = state_;
  state_ = saved;
  state_.total_steps = now.total_steps;
  state_.options = now.options;
  resumed_ = true;
  saved_step_ = -1;
}

void Trainer::save() {
  if (options_.output.empty()) return;
  Checkpoint checkpoint{state_, {}};
  for (const auto& [path, p] : updater_->parameters())
    checkpoint.tensors.emplace_back("parameter." + path, p);
  for (const auto& part : {updater_->state(), random_state(), adapter_state(*model_)})
    checkpoint.tensors.insert(checkpoint.tensors.end(), part.begin(), part.end());
  std::function<void(const fs::path&)> adapter;  // a model is its parameters
  if (options_.tune == "adapter")
    adapter = [&](const fs::path& folder) {
      save_adapter(*model_, folder.string(), options_.adapter);
    };
  save_checkpoint(checkpoint_path(options_.output, state_.step), checkpoint, adapter);
  prune_checkpoints(options_.output, options_.keep_last);
  saved_step_ = state_.step;
}

// The adapter, or the model as a folder that Hugging Face opens.
void Trainer::save_result(const fs::path& folder) {
  if (options_.tune == "adapter") return save_adapter(*model_, folder.string(), options_.adapter);
  models::save(*model_, folder.string(),
               {.overwrite = true, .tokenizer_from = options_.tokenizer_from});
}

void Trainer::evaluate_and_keep_best(TrainResult& result) {
  const auto evaluation = evaluate();
  result.evaluation = evaluation;
  evaluated_step_ = state_.step;
  const bool recorded = std::exchange(state_.evaluated_step, state_.step) == state_.step;
  if (!options_.output.empty() && !recorded)
    append_metrics(options_.output, state_.step, evaluation);
  if (on_evaluation) on_evaluation(state_.step, evaluation);
  if (state_.best && state_.best->loss <= evaluation.loss) return;
  state_.best = {state_.step, evaluation.loss};
  if (options_.output.empty()) return;
  io::AtomicFolder best(fs::path(options_.output) / "best", io::Existing::replace);
  const auto result_folder = best.path() / "result";
  save_result(result_folder);
  for (const auto& entry : fs::directory_iterator(result_folder))
    fs::rename(entry.path(), best.path() / entry.path().filename());
  fs::remove(result_folder);
  io::write_file(best.path() / "evaluation.json", evaluation_json(state_.step, evaluation));
  best.commit();
}

void Trainer::finish(TrainResult& result) {
  if (eval_ && evaluated_step_ != state_.step) evaluate_and_keep_best(result);
  if (options_.output.empty()) return;
  if (options_.save_every > 0 && saved_step_ != state_.step) save();
  if (options_.tune == "full")
    save_result(fs::path(options_.output) / "model");
  else
    save_result(options_.output);
  updater_->save_extras(options_.output);
  auto resolved = options_;
  resolved.steps = state_.total_steps;
  resolved.warmup_steps = schedule_.warmup_steps;
  io::write_file(fs::path(options_.output) / "training.json", resolved.to_json() + "\n");
}

}  // namespace budwood::train
