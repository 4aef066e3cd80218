#include <budwood/peft/merge/fold_term.h>
#include <budwood/peft/methods/ia3_config.h>

namespace budwood {
namespace {

FoldTerm term(const AdapterConfig& config, const ModuleTensors& tensors) {
  FoldTerm term;
  auto factors = tensors.at("ia3_l", 2);
  factors.shape = {factors.size()};
  const bool input = static_cast<const IA3Config&>(config).is_feedforward(tensors.path());
  (input ? term.input_gain : term.gain) = std::move(factors);
  return term;
}

const bool registered = register_fold("IA3", {.suffixes = {"ia3_l"}, .term = term});

}  // namespace
}  // namespace budwood
