#include <ATen/ATen.h>

#include <budwood/peft/kernels/adam8bit.h>
#include <budwood/peft/optim/adamw.h>
#include <budwood/quant/error.h>
#include <budwood/quant/tensors.h>
#include <algorithm>
#include <cmath>

namespace budwood::optim {
namespace {

// The code of 0, with which moments begin.
uint8_t code_of_zero(bool with_sign) {
  const auto& map = kernels::dynamic_map(with_sign);
  return static_cast<uint8_t>(std::ranges::find(map, 0.0f) - map.begin());
}

/// AdamW with moments in a byte each and a scale for each block of elements (kernels/adam8bit.h).
/// "exp_avg" and "exp_avg_sq" are codes, uint8 of the tensor's shape, "exp_avg_scale" and
/// "exp_avg_sq_scale" fp32 [blocks]. Small tensors are AdamW's.
class AdamW8bitRule final : public UpdateRule {
 public:
  explicit AdamW8bitRule(const RuleOptions& options) : options_(options), small_(options) {}

  const UpdateRule& rule_for(const std::string&, const at::Tensor& p) const override {
    if (p.numel() < options_.min_8bit_size || p.scalar_type() == at::kDouble) return small_;
    return *this;
  }

  TensorState fresh(const at::Tensor& p) const override {
    const auto options = p.options().requires_grad(false);
    const int64_t blocks = (p.numel() + options_.block_size - 1) / options_.block_size;
    const auto bytes = options.dtype(at::kByte), floats = options.dtype(at::kFloat);
    return {{"exp_avg", at::full(p.sizes(), code_of_zero(true), bytes)},
            {"exp_avg_scale", at::zeros({blocks}, floats)},
            {"exp_avg_sq", at::full(p.sizes(), code_of_zero(false), bytes)},
            {"exp_avg_sq_scale", at::zeros({blocks}, floats)},
            {"step", at::scalar_tensor(int64_t{0}, at::kLong)}};
  }

  void update(at::Tensor p, at::Tensor grad, TensorState& state, double rate) const override {
    if (!p.device().is_cpu())
      throw Error("adamw8bit", "tensors on the CPU are updated, found one on " + p.device().str() +
                                   ": use adamw there");
    const auto t = static_cast<double>(count_step(state));
    const bool decays = p.dim() >= 2 || options_.decay_vectors;
    const kernels::Adam8bitStep step{
        .beta1 = static_cast<float>(options_.beta1),
        .beta2 = static_cast<float>(options_.beta2),
        .eps = static_cast<float>(options_.eps),
        .rate = static_cast<float>(rate / (1.0 - std::pow(options_.beta1, t))),
        .correction2 = static_cast<float>(std::sqrt(1.0 - std::pow(options_.beta2, t))),
        .decay = decays ? static_cast<float>(1.0 - rate * options_.weight_decay) : 1.0f};
    const auto moment = [&](const std::string& name) {
      return kernels::CodedMoment{state.at(name).mutable_data_ptr<uint8_t>(),
                                  state.at(name + "_scale").mutable_data_ptr<float>()};
    };
    const auto first = moment("exp_avg"), second = moment("exp_avg_sq");
    // Codes lie as the elements of a contiguous tensor do.
    const auto g = grad.to(at::kFloat).contiguous();
    auto values = p.to(at::kFloat).contiguous();
    auto* to = values.mutable_data_ptr<float>();
    const auto* from = g.const_data_ptr<float>();
    const auto threads = quant::torch_threads();
    const int64_t n = p.numel(), block = options_.block_size;
    const int64_t blocks = (n + block - 1) / block;
    const auto team = std::clamp<int64_t>(n / (1 << 15), 1, threads.count);
    const auto work = [&](int member) {
      const int64_t begin = blocks * member / team * block;
      const int64_t end = std::min(n, blocks * (member + 1) / team * block);
      kernels::adamw_8bit(step, block, begin, end - begin, to, from, first, second);
    };
    if (team > 1)
      threads.run(static_cast<int>(team), work);
    else
      work(0);
    if (!values.is_same(p)) p.copy_(values);
  }

 private:
  RuleOptions options_;
  AdamWRule small_;
};

const bool registered = register_rule("adamw8bit", [](const RuleOptions& options) {
  return std::make_unique<AdamW8bitRule>(options);
});

}  // namespace
}  // namespace budwood::optim
