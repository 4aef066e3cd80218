#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <budwood/peft/ops/recompute.h>

namespace budwood::ops {
namespace {

using Block = std::function<at::Tensor(const at::Tensor&)>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Kept : torch::CustomClassHolder {
  Block block;
  at::Device device = at::kCPU;
  std::vector<std::pair<at::Generator, at::Tensor>> random;  // generators and their states then
};

std::vector<std::pair<at::Generator, at::Tensor>> random_state(at::Device device) {
  std::vector<std::pair<at::Generator, at::Tensor>> states;
  const auto add = [&](at::Generator generator) {
    const std::lock_guard lock(generator.mutex());
    states.emplace_back(generator, generator.get_state());
  };
  add(at::detail::getDefaultCPUGenerator());
  if (!device.is_cpu()) add(at::globalContext().defaultGenerator(device));
  return states;
}

void set_random_state(const std::vector<std::pair<at::Generator, at::Tensor>>& states) {
  for (auto [generator, state] : states) {
    const std::lock_guard lock(generator.mutex());
    generator.set_state(state);
  }
}

// Draws what was drawn then, and leaves the generators as they were.
class Replay {
 public:
  explicit Replay(const Kept& kept) : now_(random_state(kept.device)) {
    set_random_state(kept.random);
  }
  ~Replay() { set_random_state(now_); }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

 private:
  std::vector<std::pair<at::Generator, at::Tensor>> now_;
};

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList parameters,
                            const Block& block) {
    auto kept = c10::make_intrusive<Kept>();
    kept->block = block;
    kept->device = x.device();
    kept->random = random_state(kept->device);
    ctx->saved_data["kept"] = c10::IValue::make_capsule(std::move(kept));
    variable_list saved{x};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
    return block(x);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto capsule = ctx->saved_data["kept"].toCapsule();
    const auto& kept = static_cast<const Kept&>(*capsule);
    const auto saved = ctx->get_saved_variables();
    variable_list result(saved.size() + 1);  // x, parameters, block
    const at::AutoGradMode on(true);
    const auto x = saved[0].detach().requires_grad_(ctx->needs_input_grad(0));
    variable_list wanted;
    std::vector<size_t> places;
    for (size_t i = 0; i < saved.size(); ++i)
      if (ctx->needs_input_grad(i)) {
        wanted.push_back(i == 0 ? x : saved[i]);
        places.push_back(i);
      }
    if (wanted.empty() || !grads[0].defined()) return result;
    at::Tensor y;
    {
      const Replay replay(kept);
      y = kept.block(x);
    }
    const auto found = torch::autograd::grad({y}, wanted, {grads[0]}, /*retain_graph=*/false,
                                             /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < places.size(); ++i) result[places[i]] = found[i];
    return result;
  }
};

}  // namespace

at::Tensor recompute(const Block& block, const at::Tensor& x,
                     const std::vector<at::Tensor>& parameters) {
  if (!at::GradMode::is_enabled()) return block(x);
  return Recompute::apply(x, at::TensorList(parameters), block);
}

}  // namespace budwood::ops
