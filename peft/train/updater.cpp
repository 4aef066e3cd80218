#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <fmt/format.h>

#include <budwood/peft/inject.h>
#include <budwood/peft/optim/block_schedule.h>
#include <budwood/peft/optim/fused_backward.h>
#include <budwood/peft/optim/lora_fa.h>
#include <budwood/peft/optim/mezo.h>
#include <budwood/peft/train/updater.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <mutex>
#include <optional>
#include <unordered_set>

namespace budwood::train {
namespace {

// A tensor that two modules share is trained once.
NamedTensors unique_parameters(torch::nn::Module& model) {
  NamedTensors unique;
  std::unordered_set<const void*> seen;
  for (auto& [path, p] : trainable_parameters(model))
    if (seen.insert(p.unsafeGetTensorImpl()).second) unique.emplace_back(path, p);
  if (unique.empty())
    throw Error("Trainer", "no parameter of the model requires grad: inject an adapter first");
  return unique;
}

int64_t bytes_of(const NamedTensors& tensors) {
  int64_t sum = 0;
  for (const auto& [path, p] : tensors) sum += static_cast<int64_t>(p.nbytes());
  return sum;
}

// A parameter that the forward does not use would stay as it is, silently.
void require_all(int64_t with_gradient, const NamedTensors& parameters, const std::string& first) {
  const auto trained = std::ranges::count_if(
      parameters, [](const auto& named) { return named.second.requires_grad(); });
  if (with_gradient < trained)
    throw Error(
        "Trainer",
        fmt::format("{} of {} trainable tensors got no gradient{}: the model's forward does "
                    "not use {}",
                    trained - with_gradient, trained,
                    first.empty() ? "" : ", the first is " + first, first.empty() ? "them" : "it"));
}

std::shared_ptr<const optim::UpdateRule> rule_of(const TrainOptions& o) {
  const bool plain_adam = o.optimizer == "lora_fa";
  return optim::make_rule(plain_adam ? "adamw" : o.optimizer, {.beta1 = o.beta1,
                                                               .beta2 = o.beta2,
                                                               .eps = o.eps,
                                                               .weight_decay = o.weight_decay,
                                                               .rank = o.galore_rank,
                                                               .refresh_every = o.galore_refresh,
                                                               .scale = o.galore_scale});
}

/// Steps of a rule, and which blocks take part in them.
class RuleUpdater : public Updater {
 public:
  RuleUpdater(NamedTensors parameters, const TrainOptions& o)
      : optimizer_(parameters, rule_of(o),
                   optim::lora_plus_rates(parameters, o.lora_plus_ratio,
                                          o.lora_plus_embedding_rate / o.learning_rate)),
        max_norm_(o.max_grad_norm),
        clip_value_(o.clip_value) {
    if (o.blocks != "all")
      schedule_.emplace(parameters, optim::BlockOptions{.kind = o.blocks,
                                                        .active = o.active_blocks,
                                                        .every = o.block_steps,
                                                        .order = o.block_order,
                                                        .seed = static_cast<uint64_t>(o.seed)});
  }
  ~RuleUpdater() override {
    if (schedule_) schedule_->thaw();
  }

  void begin(int64_t step) override {
    if (schedule_) schedule_->apply(optimizer_, step);
  }
  void end() override { optimizer_.zero_grad(); }
  const NamedTensors& parameters() const override { return optimizer_.parameters(); }
  NamedTensors state() const override { return optimizer_.state(); }
  void restore(const NamedTensors& state) override { optimizer_.restore(state); }
  int64_t state_bytes() const override {
    return static_cast<int64_t>(static_cast<double>(optimizer_.state_bytes()) * trained_part());
  }
  int64_t gradient_bytes() const override {
    return static_cast<int64_t>(static_cast<double>(bytes_of(parameters())) * trained_part());
  }

 protected:
  // The part of the parameters that is trained at a time, by bytes.
  double trained_part() const {
    if (!schedule_) return 1.0;
    const auto in = schedule_->trained(0);
    int64_t trained = 0;
    for (size_t i = 0; i < in.size(); ++i)
      if (in[i]) trained += static_cast<int64_t>(parameters()[i].second.nbytes());
    return static_cast<double>(trained) / static_cast<double>(bytes_of(parameters()));
  }

  optim::Optimizer optimizer_;
  double max_norm_, clip_value_;
  bool checked_ = false;

 private:
  std::optional<optim::BlockSchedule> schedule_;
};

/// All gradients first, then all updates.
class AfterBackward final : public RuleUpdater {
 public:
  AfterBackward(NamedTensors parameters, const TrainOptions& o,
                std::optional<optim::LoraFa> lora_fa)
      : RuleUpdater(std::move(parameters), o), lora_fa_(std::move(lora_fa)) {}

  double step(StepLoss& loss, double rate) override {
    for (int64_t i = 0; i < loss.parts(); ++i) loss.part(i).backward();
    if (!checked_) check();
    if (lora_fa_) lora_fa_->correct_gradients();
    const double norm = optim::clip_gradients(parameters(), max_norm_);
    if (!std::isfinite(norm)) return norm;
    if (clip_value_ > 0) clip();
    optimizer_.step(rate);
    return norm;
  }

 private:
  void check() {
    int64_t with = 0;
    std::string first;
    for (const auto& [path, p] : parameters()) {
      if (!p.requires_grad()) continue;
      if (p.grad().defined())
        ++with;
      else if (first.empty())
        first = path;
    }
    require_all(with, parameters(), first);
    checked_ = true;
  }
  void clip() const {
    const at::NoGradGuard no_grad;
    for (const auto& [path, p] : parameters())
      if (p.grad().defined()) p.grad().clamp_(-clip_value_, clip_value_);
  }

  std::optional<optim::LoraFa> lora_fa_;
};

/// Each update as soon as its gradient is there.
class DuringBackward final : public RuleUpdater {
 public:
  DuringBackward(NamedTensors parameters, const TrainOptions& o)
      : RuleUpdater(std::move(parameters), o),
        backward_(optimizer_, {.clip_norm = o.optimizer == "adalomo" ? 0.0 : max_norm_,
                               .clip_value = clip_value_}) {}

  double step(StepLoss& loss, double rate) override {
    if (loss.parts() != 1)
      throw Error("Trainer", fmt::format("a step has {} batches, but parameters that are updated "
                                         "during the backward take one: set grad_accumulation to 1",
                                         loss.parts()));
    const auto result = backward_.backward(loss.part(0), rate);
    if (!checked_ && !result.skipped) require_all(result.updated, parameters(), "");
    checked_ = checked_ || !result.skipped;
    return result.norm;
  }
  NamedTensors state() const override {
    auto all = RuleUpdater::state();
    for (auto& named : backward_.state()) all.push_back(std::move(named));
    return all;
  }
  void restore(const NamedTensors& state) override {
    RuleUpdater::restore(state);
    backward_.restore(state);
  }
  int64_t gradient_bytes() const override {
    int64_t largest = 0;
    for (const auto& [path, p] : parameters())
      largest = std::max(largest, static_cast<int64_t>(p.nbytes()));
    return largest;
  }

 private:
  optim::FusedBackward backward_;
};

/// No gradients at all.
class MezoUpdater final : public Updater {
 public:
  MezoUpdater(NamedTensors parameters, const TrainOptions& o)
      : mezo_(std::move(parameters), {.eps = o.mezo_eps,
                                      .weight_decay = o.weight_decay,
                                      .seed = static_cast<uint64_t>(o.seed)}) {}

  double step(StepLoss& loss, double rate) override {
    mezo_.step(
        [&] {
          const auto random = generator_state();
          double sum = 0;
          for (int64_t i = 0; i < loss.parts(); ++i) sum += loss.part(i).item<double>();
          if (!random.equal(generator_state()))
            throw Error("Trainer",
                        "the forward draws random numbers, but MeZO compares two losses "
                        "of the same function: set dropout (lora_dropout) to 0");
          return sum;
        },
        rate);
    return std::abs(mezo_.log().projected.back());
  }
  const NamedTensors& parameters() const override { return mezo_.parameters(); }
  NamedTensors state() const override { return mezo_.state(); }
  void restore(const NamedTensors& state) override { mezo_.restore(state); }
  int64_t gradient_bytes() const override { return 0; }
  int64_t state_bytes() const override { return 0; }
  void save_extras(const std::filesystem::path& folder) const override {
    mezo_.log().save(folder / "mezo.safetensors");
  }

 private:
  static at::Tensor generator_state() {
    auto generator = at::globalContext().defaultGenerator(at::kCPU);
    const std::lock_guard lock(generator.mutex());
    return generator.get_state();
  }

  optim::Mezo mezo_;
};

}  // namespace

std::unique_ptr<Updater> make_updater(torch::nn::Module& model, const TrainOptions& options) {
  std::optional<optim::LoraFa> lora_fa;
  if (options.optimizer == "lora_fa") lora_fa.emplace(model);
  auto parameters = unique_parameters(model);
  const bool mezo = options.optimizer == "mezo";
  if (!mezo && !options.updates_during_backward())
    return std::make_unique<AfterBackward>(std::move(parameters), options, std::move(lora_fa));
  if (penalty(model).defined())
    throw Error("Trainer", fmt::format("an adapter (AdaLoRA) needs all gradients of a step, which "
                                       "do not exist with optimizer '{}'{}: use adamw",
                                       options.optimizer,
                                       options.fused_backward ? " and fused_backward" : ""));
  if (mezo) return std::make_unique<MezoUpdater>(std::move(parameters), options);
  return std::make_unique<DuringBackward>(std::move(parameters), options);
}

}  // namespace budwood::train
