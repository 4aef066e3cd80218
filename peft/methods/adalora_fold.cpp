#include <budwood/peft/merge/fold_term.h>
#include <budwood/peft/methods/adalora_config.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

namespace budwood {
namespace {

FoldTerm term(const AdapterConfig& config, const ModuleTensors& tensors) {
  const auto& own = static_cast<const AdaLoraConfig&>(config);
  FoldTerm term;
  term.a = tensors.at("lora_A", 2);
  term.b = tensors.at("lora_B", 2);
  const auto values = tensors.at("lora_E", 2);
  if (values.size() != term.a.shape[0])
    throw Error("merge", fmt::format("{}: lora_E holds {} values, lora_A has {} rows",
                                     tensors.path(), values.size(), term.a.shape[0]));
  const int64_t in = term.a.shape[1];
  for (int64_t k = 0; k < term.a.shape[0]; ++k)
    for (int64_t j = 0; j < in; ++j)
      term.a.values[static_cast<size_t>(k * in + j)] *= values.values[static_cast<size_t>(k)];
  term.scaling = own.scale();
  return term;
}

const bool registered =
    register_fold("ADALORA", {.suffixes = {"lora_A", "lora_B", "lora_E"}, .term = term});

}  // namespace
}  // namespace budwood
