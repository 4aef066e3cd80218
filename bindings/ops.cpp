#include <torch/csrc/utils/pybind.h>
// Not sorted: torch's pybind11 comes first.
#include <pybind11/stl.h>

#include <budwood/peft/ops/kept.h>
#include <budwood/peft/ops/projections.h>
#include <budwood/quant/error.h>

namespace py = pybind11;
using namespace budwood;

namespace {

using OptionalTensor = std::optional<at::Tensor>;
// parts, format, [out, in], bias, A, B, scaling
using FlatProjection = std::tuple<std::vector<at::Tensor>, int64_t, std::vector<int64_t>,
                                  OptionalTensor, OptionalTensor, OptionalTensor, double>;

ops::Source source(const std::string& reading, std::vector<at::Tensor> t, double eps) {
  const auto wants = [&](size_t count) {
    if (t.size() != count)
      throw Error("project", reading + " takes " + std::to_string(count) + " tensors, found " +
                                 std::to_string(t.size()));
  };
  if (reading == "plain") return wants(1), ops::Source::plain(t[0]);
  if (reading == "rms_norm") return wants(2), ops::Source::rms_norm(t[0], t[1], eps);
  if (reading == "layer_norm") return wants(3), ops::Source::layer_norm(t[0], t[1], t[2], eps);
  if (reading == "swiglu") return wants(2), ops::Source::gated(kernels::Gate::silu, t[0], t[1]);
  if (reading == "geglu") return wants(2), ops::Source::gated(kernels::Gate::gelu, t[0], t[1]);
  if (reading == "geglu_tanh")
    return wants(2), ops::Source::gated(kernels::Gate::gelu_tanh, t[0], t[1]);
  if (reading == "gelu") return wants(1), ops::Source::gelu(t[0], "none");
  if (reading == "gelu_tanh") return wants(1), ops::Source::gelu(t[0], "tanh");
  throw Error("project", "unknown reading " + reading +
                             "; known: plain, rms_norm, layer_norm, swiglu, geglu, geglu_tanh, "
                             "gelu, gelu_tanh");
}

std::vector<at::Tensor> project(const std::string& reading, std::vector<at::Tensor> inputs,
                                double eps, std::vector<FlatProjection> flat) {
  std::vector<ops::Projection> projections;
  for (auto& [parts, format, shape, bias, a, b, scaling] : flat)
    projections.push_back(
        {quant::Weight::from_parts(std::move(parts), format, shape.at(0), shape.at(1)),
         bias.value_or(at::Tensor()), a.value_or(at::Tensor()), b.value_or(at::Tensor()), scaling});
  return ops::project(source(reading, std::move(inputs), eps), projections);
}

}  // namespace

void bind_ops(py::module_& m) {
  m.def("kept_in_bfloat16", [] { return ops::kept_type(at::kFloat) == at::kBFloat16; });
  m.def("keep_in_bfloat16", [](bool on) { ops::set_kept_type(on ? at::kBFloat16 : at::kFloat); });
  m.def("project", &project, py::arg("reading"), py::arg("inputs"), py::arg("eps"),
        py::arg("projections"), py::call_guard<py::gil_scoped_release>(),
        "Several projections of one input: [(parts, format, [out, in], bias, A, B, scaling)].\n\n"
        "reading: 'plain' (x), 'rms_norm' (x, weight), 'layer_norm' (x, weight, bias), 'swiglu', "
        "'geglu' or 'geglu_tanh' (gate, up), 'gelu' or 'gelu_tanh' (x). What is read is computed "
        "again in the backward.");
}
