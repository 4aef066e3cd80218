#include <budwood/peft/merge/merge_plan.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>

/// Adapters on stacks of experts (HF PEFT's target_parameters). transformers holds gate and up of
/// all experts as one parameter and down as another; files hold them so or expert by expert.
namespace budwood {
namespace {

// Families whose stacks are [experts, in, out] where both readings of a shape are possible.
constexpr std::array<std::string_view, 2> kTransposed = {"gpt_oss", "llama4_text"};

/// The matrices of one expert that a parameter is made of, one below the other.
std::vector<std::vector<std::string>> parts_of(const std::string& parameter) {
  if (parameter == "gate_up_proj") return {{"gate_proj", "up_proj"}, {"w1", "w3"}};
  if (parameter == "down_proj") return {{"down_proj"}, {"w2"}};
  return {};
}

// "model.layers.0.mlp.experts", and as files of Mixtral have it.
std::vector<std::string> owners_of(const std::string& path) {
  std::vector<std::string> owners = {path};
  constexpr std::string_view ours = ".mlp.experts";
  if (path.ends_with(ours))
    owners.push_back(path.substr(0, path.size() - ours.size()) + ".block_sparse_moe.experts");
  return owners;
}

std::string last_of(const std::string& path) {
  return path.substr(path.rfind('.') + 1);
}
std::string owner_of(const std::string& path) {
  return path.substr(0, path.rfind('.'));
}

}  // namespace

FoldTerm Edit::term(const std::vector<int64_t>& shape, int64_t expert) const {
  if (!experts) return adapter->term(module);
  const auto& stack = *experts->stack;
  if (experts->all)
    return adapter->expert_term(stack, experts->parameter, expert, 0, stack.b.shape[0]);
  return adapter->expert_term(stack, experts->parameter, experts->expert, experts->first, shape[0]);
}

// Whether the model has the parameter with the sizes of these factors.
bool MergePlan::holds(const std::string& parameter, const AdapterFile::Stack& stack,
                      int64_t experts) {
  const int64_t in = stack.a.shape[1], out = stack.b.shape[0];
  if (const auto* whole = layout.find(parameter)) {
    const auto& shape = whole->shape;
    return shape.size() == 3 && shape[0] == experts &&
           ((shape[1] == in && shape[2] == out) || (shape[1] == out && shape[2] == in));
  }
  for (const auto& parts : parts_of(last_of(parameter)))
    for (const auto& owner : owners_of(owner_of(parameter))) {
      int64_t rows = 0;
      bool fits = true;
      for (const auto& part : parts) {
        const auto* tensor = layout.find(fmt::format("{}.0.{}.weight", owner, part));
        fits &= tensor != nullptr && tensor->shape.size() == 2 && tensor->shape[1] == in;
        if (fits) rows += tensor->shape[0];
      }
      if (fits && rows == out) return true;
    }
  return false;
}

void MergePlan::add_stack(const AdapterFile& adapter, double weight, const std::string& parameter,
                          std::shared_ptr<const AdapterFile::Stack> stack) {
  const auto& lora = static_cast<const LoraConfig&>(adapter.config());
  const int64_t experts = stack->a.shape[0] / lora.rank(parameter);
  const int64_t in = stack->a.shape[1], out = stack->b.shape[0];
  if (layout.find(parameter) != nullptr) {
    auto& output = *output_of(parameter);
    output.grouped = false;
    const auto& shape = output.spec.shape;
    output.transposed = shape[1] == in;
    if (in == out)
      output.transposed = std::find(kTransposed.begin(), kTransposed.end(), layout.model_type()) !=
                          kTransposed.end();
    output.edits.push_back({&adapter, parameter, weight,
                            ExpertEdit{.stack = stack, .parameter = parameter, .all = true}});
    return;
  }
  for (const auto& parts : parts_of(last_of(parameter)))
    for (const auto& owner : owners_of(owner_of(parameter))) {
      if (layout.find(fmt::format("{}.0.{}.weight", owner, parts[0])) == nullptr) continue;
      for (int64_t expert = 0; expert < experts; ++expert) {
        int64_t first = 0;
        for (const auto& part : parts) {
          const auto name = fmt::format("{}.{}.{}.weight", owner, expert, part);
          auto* const output = output_of(name);
          if (output == nullptr || output->spec.shape.size() != 2 || output->spec.shape[1] != in ||
              first + output->spec.shape[0] > out) {
            faults_.push_back(fmt::format("{} of {}: {} is missing or of another shape", parameter,
                                          adapter.folder().string(), name));
            continue;
          }
          output->grouped = false;
          output->edits.push_back(
              {&adapter, parameter, weight,
               ExpertEdit{
                   .stack = stack, .parameter = parameter, .expert = expert, .first = first}});
          first += output->spec.shape[0];
        }
      }
    }
}

void MergePlan::add_stacks(const AdapterFile& adapter, double weight) {
  const auto* lora = dynamic_cast<const LoraConfig*>(&adapter.config());
  for (const auto& path : adapter.stack_paths()) {
    auto stacks = adapter.stacks(path);
    // transformers declares gate_up_proj before down_proj; HF PEFT wraps in that order.
    std::vector<std::string> parameters;
    for (const char* name : {"gate_up_proj", "down_proj"})
      for (const auto& target : adapter.target_parameters())
        if (last_of(target) == name) parameters.push_back(path + "." + name);
    for (const auto& target : adapter.target_parameters()) {
      const auto name = path + "." + last_of(target);
      if (std::find(parameters.begin(), parameters.end(), name) == parameters.end())
        parameters.push_back(name);
    }
    for (const auto& stack : stacks) {
      const auto fits = [&](const std::string& parameter) {
        const int64_t rank = lora->rank(parameter);
        const int64_t experts = stack.a.shape[0] / rank;
        return stack.a.shape[0] == stack.b.shape[1] && stack.a.shape[0] % rank == 0 &&
               holds(parameter, stack, experts);
      };
      const auto found = std::find_if(parameters.begin(), parameters.end(), fits);
      if (found == parameters.end()) {
        faults_.push_back(
            fmt::format("{} of {}: no parameter of the model has the sizes of "
                        "factors {} and {}",
                        stack.file_path, adapter.folder().string(), io::shape_text(stack.a.shape),
                        io::shape_text(stack.b.shape)));
        continue;
      }
      const auto parameter = *found;
      parameters.erase(found);
      add_stack(adapter, weight, parameter, std::make_shared<AdapterFile::Stack>(stack));
    }
  }
}

}  // namespace budwood
