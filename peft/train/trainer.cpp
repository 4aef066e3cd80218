#include <budwood/peft/train/trainer.h>

#include <ATen/ATen.h>
#include <budwood/peft/adapter.h>
#include <budwood/peft/inject.h>
#include <budwood/peft/models/selected.h>
#include <budwood/peft/models/train_all.h>
#include <budwood/peft/ops/kept.h>
#include <budwood/peft/train/run_folder.h>
#include <budwood/peft/train/signals.h>
#include <budwood/quant/error.h>
#include <budwood/quant/memory_pool.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>

namespace budwood::train {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// Ends a step that is not to be made any more.
struct Stopped {};

template <class T>
const T& required(const std::shared_ptr<T>& pointer, const char* what) {
  if (!pointer) throw Error("Trainer", fmt::format("no {} was given", what));
  return *pointer;
}

SampleOptions sample_options(const TrainOptions& o, bool training) {
  o.validate();
  return {o.sequence_length, o.batch_size,          o.packing,
          o.long_rows,       training && o.shuffle, static_cast<uint64_t>(o.seed)};
}

Schedule make_schedule(const TrainOptions& o, int64_t total) {
  const auto by_ratio = std::ceil(o.warmup_ratio * static_cast<double>(total));
  return {o.schedule, o.warmup_steps > 0 ? o.warmup_steps : static_cast<int64_t>(by_ratio), total,
          o.min_learning_rate_ratio};
}

int64_t count_steps(const TrainOptions& o, const Sampler& sampler) {
  if (o.steps > 0) return o.steps;
  const int64_t each = (sampler.batches() + o.grad_accumulation - 1) / o.grad_accumulation;
  return std::max<int64_t>(1, std::llround(std::ceil(o.epochs * static_cast<double>(each))));
}

template <class F>
class AtExit {
 public:
  explicit AtExit(F body) : body_(std::move(body)) {}
  ~AtExit() { body_(); }

 private:
  F body_;
};

}  // namespace

Trainer::Trainer(std::shared_ptr<models::CausalLM> model, std::shared_ptr<const Dataset> train,
                 std::shared_ptr<const Dataset> eval, TrainOptions options)
    : model_((required(model, "model"), std::move(model))),
      options_(std::move(options)),
      sampler_(train, sample_options(options_, true)) {
  if (options_.tune == "full") models::train_all(*model_);
  updater_ = make_updater(*model_, options_);
  check(*train, sampler_);
  if (eval) {
    eval_.emplace(eval, sample_options(options_, false));
    check(*eval, *eval_);
  } else if (options_.eval_every > 0) {
    throw Error("Trainer", fmt::format("eval_every is {}, but there is no evaluation data",
                                       options_.eval_every));
  }
  if (!options_.output.empty() && options_.tune == "adapter") {
    const auto modules = model_->named_modules("", /*include_self=*/false);
    if (std::none_of(modules.begin(), modules.end(), [&](const auto& item) {
          return item.key().ends_with(options_.adapter) &&
                 dynamic_cast<const Adapter*>(item.value().get());
        }))
      throw Error("Trainer", fmt::format("the model has no adapter named '{}' that could be saved",
                                         options_.adapter));
  }
  state_.total_steps = count_steps(options_, sampler_);
  state_.options = options_.to_json();
  state_.data_rows = train->rows();
  state_.data_tokens = train->tokens();
  state_.data_checksum = train->checksum();
  state_.base = base_fingerprint(*model_);
  schedule_ = make_schedule(options_, state_.total_steps);
  if (options_.gradient_checkpointing > 0)
    model_->set_checkpointing(options_.gradient_checkpointing);
  resume();
}

void Trainer::check(const Dataset& data, const Sampler& sampler) const {
  const auto& config = model_->config();
  data.check(config.vocab_size);
  const auto longest = sampler.report().longest;
  if (config.max_position_embeddings > 0 && longest > config.max_position_embeddings)
    throw Error(
        "Trainer",
        fmt::format("the longest sequence has {} tokens, the model was made for at most {}: "
                    "set sequence_length to {} or less",
                    longest, config.max_position_embeddings, config.max_position_embeddings));
}

TrainResult Trainer::run() {
  const auto begin = Clock::now();
  const double before = state_.seconds;
  run_seconds_ = 0.0;
  run_tokens_ = run_steps_ = 0;
  open_output();
  const quant::MemoryPool pool;
  const ops::ScopedKeptType kept(kept_type());
  const ModeScope mode(*model_, true);
  const auto callers = random_state();
  const AtExit give_back([&] {
    random_ = random_state();
    set_random_state(callers);
    stop_ = false;
  });
  if (random_.empty())
    at::manual_seed(static_cast<uint64_t>(options_.seed));
  else
    set_random_state(random_);

  TrainResult result;
  result.final_loss = std::nan("");
  while (state_.step < state_.total_steps) {
    const auto outcome = stop_requested() ? std::nullopt : train_step();
    state_.seconds = before + seconds_since(begin);
    if (!outcome) {
      result.interrupted = true;
      break;
    }
    const bool last = state_.step == state_.total_steps;
    const auto due = [&](int64_t every) { return every > 0 && state_.step % every == 0; };
    if (last || due(options_.log_every)) log(*outcome, result);
    if (due(options_.eval_every)) evaluate_and_keep_best(result);
    state_.seconds = before + seconds_since(begin);
    if (due(options_.save_every)) save();
  }
  if (!result.interrupted)
    finish(result);
  else if (saved_step_ != state_.step)
    save();
  state_.seconds = before + seconds_since(begin);
  result.steps = state_.step;
  result.best = state_.best;
  result.tokens = state_.tokens;
  result.seconds = state_.seconds;
  result.tokens_per_second =
      run_seconds_ > 0 ? static_cast<double>(run_tokens_) / run_seconds_ : 0.0;
  result.peak_rss_mb = peak_rss_mb();
  result.warnings = warnings_;
  return result;
}

/// The loss of the batches of one step.
class Trainer::Parts final : public StepLoss {
 public:
  /// `rows`: the tokens of each batch that are back-propagated through; empty = all.
  Parts(Trainer& trainer, const std::vector<Batch>& batches,
        const std::vector<std::vector<int64_t>>& rows, int64_t counted)
      : trainer_(trainer),
        batches_(batches),
        rows_(rows),
        counted_(counted),
        sums_(batches.size()) {}

  int64_t parts() const override { return static_cast<int64_t>(batches_.size()); }
  at::Tensor part(int64_t index) override {
    // A step without gradients is quick, and has changed the parameters meanwhile.
    if (at::GradMode::is_enabled() && trainer_.stop_requested()) throw Stopped();
    auto& model = *trainer_.model_;
    const auto& batch = batches_[static_cast<size_t>(index)];
    const auto loss = rows_.empty() ? model.loss(batch.tokens, batch.labels)
                                    : models::selected_loss(model, batch.tokens, batch.labels,
                                                            rows_[static_cast<size_t>(index)]);
    const auto value = loss.sum.item<double>();
    sums_[static_cast<size_t>(index)] = value;
    if (!std::isfinite(value)) trainer_.not_finite("loss", sum() / static_cast<double>(counted_));
    auto mean = loss.sum / static_cast<double>(counted_);
    // Once for each step, whatever it is made of.
    if (index + 1 == parts())
      if (const auto term = penalty(model); term.defined()) mean = mean + term;
    return mean;
  }
  /// Of the last evaluation of each part, without the penalty.
  double sum() const {
    double all = 0;
    for (const double one : sums_) all += one;
    return all;
  }

 private:
  Trainer& trainer_;
  const std::vector<Batch>& batches_;
  const std::vector<std::vector<int64_t>>& rows_;
  int64_t counted_;
  std::vector<double> sums_;
};

std::optional<Trainer::StepOutcome> Trainer::train_step() {
  const auto begin = Clock::now();
  const auto position = sampler_.state();
  const auto random = random_state();
  const auto device = device_of(*model_);
  // The step must not have happened when it does not come to its end.
  bool done = false;
  const AtExit roll_back([&] {
    updater_->end();
    if (done) return;
    sampler_.restore(position);
    set_random_state(random);
  });

  std::vector<Batch> batches;
  int64_t counted = 0, tokens = 0;
  do {
    batches.push_back(sampler_.next());
    counted += batches.back().counted;
    tokens += batches.back().tokens.tokens();
  } while (static_cast<int64_t>(batches.size()) < options_.grad_accumulation &&
           sampler_.state().epoch == position.epoch);
  std::vector<std::vector<int64_t>> rows;
  if (options_.selected_tokens > 0) counted = select(batches, rows);
  for (auto& batch : batches) batch = to_device(std::move(batch), device);

  before_step(*model_, state_.step);
  updater_->begin(state_.step);
  Parts parts(*this, batches, rows, counted);
  const double rate = options_.learning_rate * schedule_.multiplier(state_.step);
  double norm = 0.0;
  try {
    norm = updater_->step(parts, rate);
  } catch (const Stopped&) {
    return {};
  }
  if (!std::isfinite(norm)) not_finite("norm of the gradient", norm);
  after_step(*model_, state_.step);
  done = true;

  const double elapsed = seconds_since(begin);
  ++state_.step;
  state_.position = sampler_.state();
  state_.tokens += tokens;
  state_.loss_sum += parts.sum();
  state_.loss_tokens += counted;
  ++run_steps_;
  run_tokens_ += tokens;
  run_seconds_ += elapsed;
  interval_tokens_ += tokens;
  interval_seconds_ += elapsed;
  return StepOutcome{rate, norm};
}

// The tokens of each batch that are back-propagated through; how many of them count in the loss.
int64_t Trainer::select(const std::vector<Batch>& batches,
                        std::vector<std::vector<int64_t>>& rows) const {
  int64_t counted = 0;
  for (const auto& batch : batches) {
    rows.push_back(models::select_tokens(batch.tokens, batch.labels, options_.selected_tokens,
                                         static_cast<uint64_t>(options_.seed), state_.step,
                                         static_cast<int64_t>(rows.size())));
    const auto* label = batch.labels.const_data_ptr<int64_t>();
    for (const int64_t row : rows.back()) counted += label[row] >= 0;
  }
  if (counted == 0)
    throw Error("Trainer", fmt::format("step {}: no chosen token counts in the loss with "
                                       "selected_tokens {}: choose more",
                                       state_.step + 1, options_.selected_tokens));
  return counted;
}

void Trainer::not_finite(const std::string& what, double value) const {
  const auto saved = options_.output.empty() ? decltype(list_checkpoints(""))()
                                             : list_checkpoints(options_.output);
  throw Error(
      "Trainer",
      fmt::format("step {}: the {} is {}. The {} is as it was after step {}; newest "
                  "checkpoint: {}. A smaller learning_rate or a longer warmup may help",
                  state_.step + 1, what, value, options_.tune == "full" ? "model" : "adapter",
                  state_.step, saved.empty() ? "none" : saved.back().second.string()));
}

void Trainer::log(const StepOutcome& outcome, TrainResult& result) {
  StepMetrics m;
  m.step = state_.step;
  m.total_steps = state_.total_steps;
  m.epoch = static_cast<double>(state_.position.epoch) +
            static_cast<double>(state_.position.batch) / static_cast<double>(sampler_.batches());
  m.loss = state_.loss_sum / static_cast<double>(state_.loss_tokens);
  m.learning_rate = outcome.learning_rate;
  m.grad_norm = outcome.grad_norm;
  m.tokens = state_.tokens;
  m.tokens_per_second =
      interval_seconds_ > 0 ? static_cast<double>(interval_tokens_) / interval_seconds_ : 0.0;
  m.seconds = state_.seconds;
  m.eta_seconds = run_seconds_ / static_cast<double>(run_steps_) *
                  static_cast<double>(state_.total_steps - state_.step);
  m.peak_rss_mb = peak_rss_mb();
  state_.loss_sum = 0.0;
  state_.loss_tokens = 0;
  interval_seconds_ = 0.0;
  interval_tokens_ = 0;
  result.final_loss = m.loss;
  if (!options_.output.empty()) append_metrics(options_.output, m);
  if (on_log) on_log(m);
}

at::ScalarType Trainer::kept_type() const {
  return options_.activation_dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
}

MemoryPlan Trainer::memory_plan() const {
  const ops::ScopedKeptType narrow(kept_type());
  const auto tokens = static_cast<double>(options_.batch_size * sampler_.report().longest);
  const double chosen = options_.selected_tokens;
  const double kept = chosen == 0  ? tokens
                      : chosen < 1 ? chosen * tokens
                                   : chosen * static_cast<double>(options_.batch_size);
  auto plan = plan_memory(*model_, static_cast<int64_t>(std::ceil(kept)));
  plan.gradients = updater_->gradient_bytes();
  plan.optimizer = updater_->state_bytes();
  if (options_.optimizer == "mezo") plan.activations = 0;
  return plan;
}

Evaluation Trainer::evaluate() {
  if (!eval_) throw Error("Trainer::evaluate", "there is no evaluation data");
  return train::evaluate(*model_, *eval_, options_.eval_batches);
}

bool Trainer::stop_requested() const {
  return stop_ || StopOnSignal::received() != 0;
}

}  // namespace budwood::train
