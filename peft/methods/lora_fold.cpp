#include <budwood/peft/merge/fold_term.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

namespace budwood {
namespace {

FoldTerm term(const AdapterConfig& config, const ModuleTensors& tensors) {
  const auto& own = static_cast<const LoraConfig&>(config);
  FoldTerm term;
  const bool table = tensors.find("lora_embedding_A").defined();
  term.a = tensors.at(table ? "lora_embedding_A" : "lora_A.weight", 2);
  term.b = tensors.at(table ? "lora_embedding_B" : "lora_B.weight", 2);
  const int64_t rank = own.rank(tensors.path());
  if (term.a.shape[0] != rank || term.b.shape[1] != rank)
    throw Error("merge", fmt::format("{}: the configuration gives the rank {}, the factors have {} "
                                     "and {}",
                                     tensors.path(), rank, term.a.shape[0], term.b.shape[1]));
  term.scaling = own.scaling(tensors.path());
  if (own.use_qalora) {
    if (table)
      throw Error("merge", tensors.path() + ": use_qalora is for projections, not for tables");
    const int64_t groups = term.a.shape[1], group = own.qalora_group_size;
    FloatArray spread{{rank, groups * group}, {}};
    spread.values.reserve(static_cast<size_t>(rank * groups * group));
    for (const float value : term.a.values)
      spread.values.insert(spread.values.end(), static_cast<size_t>(group), value);
    term.a = std::move(spread);
    term.group = group;
    term.scaling *= own.qalora_factor(groups * group);
  }
  term.inner_bias = tensors.find("lora_B.bias");
  if (own.use_dora) term.magnitude = tensors.at("lora_magnitude_vector", 1);
  return term;
}

const bool registered = register_fold(
    "LORA", {.suffixes = {"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A",
                          "lora_embedding_B", "lora_magnitude_vector"},
             .table_suffixes = {"lora_embedding_A"},
             .term = term,
             .needs_model = [](const AdapterConfig& config) -> std::optional<std::string> {
               if (!static_cast<const LoraConfig&>(config).principal_init()) return {};
               return "an adapter that started from a decomposition of the base";
             }});

}  // namespace
}  // namespace budwood
