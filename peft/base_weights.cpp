#include <budwood/peft/base_weights.h>
#include <budwood/peft/slot.h>
#include <budwood/peft/tensor_file.h>
#include <algorithm>
#include <map>
#include <set>

namespace budwood {

std::vector<BaseWeights> base_weights(torch::nn::Module& model) {
  std::map<std::string, BaseWeights> forms;
  std::set<const void*> seen;
  const auto add = [&](const quant::Weight& w) {
    if (!seen.insert(w.parts[0].unsafeGetTensorImpl()).second) return;
    const auto name = w.packed() ? quant::form_of(w.format).name() : dtype_text(w.dtype());
    auto& form = forms[name];
    form.form = name;
    form.matrices += 1;
    form.weights += w.out * w.in;
    form.bytes += w.bytes();
  };
  const auto look_into = [&](const torch::nn::Module& module) {
    if (const auto* slot = dynamic_cast<const LinearSlotImpl*>(&module)) add(slot->weight());
    if (const auto* table = dynamic_cast<const EmbeddingSlotImpl*>(&module)) add(table->weight());
  };
  // Without itself: the model may live on the stack.
  look_into(model);
  for (const auto& module : model.modules(/*include_self=*/false)) look_into(*module);
  std::vector<BaseWeights> result;
  for (auto& [name, form] : forms) result.push_back(std::move(form));
  std::sort(result.begin(), result.end(),
            [](const BaseWeights& a, const BaseWeights& b) { return a.weights > b.weights; });
  return result;
}

WeightSample sample_weight(const std::string& path, const quant::Weight& weight) {
  const at::NoGradGuard no_grad;
  WeightSample sample{.path = path, .out = weight.out, .in = weight.in};
  sample.packed = weight.packed();
  sample.form = sample.packed ? quant::form_of(weight.format).name() : dtype_text(weight.dtype());
  size_t i = 0;
  for (const auto& [row, column] : sampled_places(path, weight.out, weight.in))
    sample.values[i++] =
        weight.rows(row, row + 1, at::kFloat).select(1, column).to(at::kCPU).item<float>();
  return sample;
}

}  // namespace budwood
