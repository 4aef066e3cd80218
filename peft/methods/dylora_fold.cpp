#include <budwood/peft/merge/fold_term.h>
#include <budwood/peft/methods/dylora_config.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

namespace budwood {
namespace {

FoldTerm term(const AdapterConfig& config, const ModuleTensors& tensors) {
  const auto& own = static_cast<const DyLoraConfig&>(config);
  const int64_t rank = own.eval_rank > 0 ? own.eval_rank : own.r;
  FoldTerm term;
  term.a = tensors.at("lora_A.weight", 2);
  const auto b = tensors.at("lora_B.weight", 2);
  if (term.a.shape[0] < rank || b.shape[1] < rank)
    throw Error("merge", fmt::format("{}: the rank {} is asked for, the factors have {} and {}",
                                     tensors.path(), rank, term.a.shape[0], b.shape[1]));
  term.a.values.resize(static_cast<size_t>(rank * term.a.shape[1]));
  term.a.shape[0] = rank;
  term.b.shape = {b.shape[0], rank};
  for (int64_t i = 0; i < b.shape[0]; ++i)
    for (int64_t k = 0; k < rank; ++k)
      term.b.values.push_back(b.values[static_cast<size_t>(i * b.shape[1] + k)]);
  term.scaling = own.lora_alpha / static_cast<double>(rank);
  return term;
}

const bool registered =
    register_fold("DYLORA", {.suffixes = {"lora_A.weight", "lora_B.weight"}, .term = term});

}  // namespace
}  // namespace budwood
