#include <budwood/peft/merge/fold_term.h>

namespace budwood {
namespace {

FoldTerm term(const AdapterConfig&, const ModuleTensors& tensors) {
  FoldTerm term;
  term.scales = tensors.at("peqa_scales", 2);
  term.zeros = tensors.find("peqa_zeros");
  return term;
}

const bool registered =
    register_fold("PEQA", {.suffixes = {"peqa_scales", "peqa_zeros"}, .term = term});

}  // namespace
}  // namespace budwood
