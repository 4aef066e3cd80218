#include <budwood/peft/merge/fold_term.h>
#include <budwood/peft/methods/vera_config.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

namespace budwood {
namespace {

FoldTerm term(const AdapterConfig&, const ModuleTensors& tensors) {
  FoldTerm term;
  const auto d = tensors.at("vera_lambda_d", 1), b = tensors.at("vera_lambda_b", 1);
  auto projection_a = tensors.shared("base_model.vera_A");
  auto projection_b = tensors.shared("base_model.vera_B");
  const int64_t out = b.size(), rank = d.size();
  if (projection_a.shape.size() != 2 || projection_b.shape.size() != 2 ||
      projection_a.shape[0] != rank || projection_b.shape[1] != rank || projection_b.shape[0] < out)
    throw Error("merge", fmt::format("{}: the frozen factors do not fit vectors of {} and {}",
                                     tensors.path(), rank, out));
  term.a = std::move(projection_a);
  term.leading_a = true;
  const int64_t in = term.a.shape[1];
  for (int64_t k = 0; k < rank; ++k)
    for (int64_t j = 0; j < in; ++j)
      term.a.values[static_cast<size_t>(k * in + j)] *= d.values[static_cast<size_t>(k)];
  term.b = {{out, rank}, {}};
  for (int64_t i = 0; i < out; ++i)
    for (int64_t k = 0; k < rank; ++k)
      term.b.values.push_back(b.values[static_cast<size_t>(i)] *
                              projection_b.values[static_cast<size_t>(i * rank + k)]);
  return term;
}

const bool registered = register_fold(
    "VERA", {.suffixes = {"vera_lambda_b", "vera_lambda_d"},
             .term = term,
             .needs_model = [](const AdapterConfig& config) -> std::optional<std::string> {
               if (static_cast<const VeraConfig&>(config).save_projection) return {};
               return "a VeRA adapter without its frozen factors";
             }});

}  // namespace
}  // namespace budwood
