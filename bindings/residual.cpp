#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/ATen.h>
#include <budwood/peft/models/original_weights.h>
#include <budwood/peft/models/residual_start.h>

namespace py = pybind11;
using namespace budwood;

namespace {

py::dict start_of_matrix(const at::Tensor& w, std::vector<at::Tensor> parts, int64_t format,
                         std::pair<int64_t, int64_t> shape, int64_t rank, double scaling,
                         const std::string& method, int64_t iterations,
                         const std::optional<at::Tensor>& covariance) {
  ResidualStart start;
  {
    const py::gil_scoped_release released;
    const auto q = quant::Weight::from_parts(std::move(parts), format, shape.first, shape.second);
    start = residual_start(w, q, rank, scaling, {method, iterations},
                           covariance.value_or(at::Tensor()));
  }
  py::dict result;
  result["a"] = start.a;
  result["b"] = start.b;
  result["parts"] = start.base ? py::cast(start.base->parts) : py::none();
  result["before"] = start.before;
  result["after"] = start.after;
  result["iteration"] = start.iteration;
  return result;
}

py::dict start_of_model(models::CausalLM& model, const std::filesystem::path& original,
                        const std::string& adapter, const std::string& method, int64_t iterations,
                        std::vector<std::vector<int64_t>> sequences) {
  models::StartReport report;
  {
    const py::gil_scoped_release released;
    report = models::start_from_original(
        model, original,
        {.residual = {method, iterations}, .adapter = adapter, .sequences = std::move(sequences)});
  }
  py::list places;
  for (const auto& place : report.places) {
    py::dict one;
    one["path"] = place.path;
    one["rank"] = place.rank;
    one["before"] = place.before;
    one["after"] = place.after;
    one["iteration"] = place.iteration;
    places.append(one);
  }
  py::dict result;
  result["places"] = places;
  result["base_changed"] = report.base_changed;
  return result;
}

}  // namespace

void bind_residual(py::module_& m) {
  m.def("residual_start", &start_of_matrix, py::arg("w"), py::arg("parts"), py::arg("format"),
        py::arg("shape"), py::arg("rank"), py::arg("scaling"), py::arg("method") = "loftq",
        py::arg("iterations") = 1, py::arg("covariance") = py::none(),
        "Factors that begin with what quantising took away; see residual.h.");
  m.def("start_from_original", &start_of_model, py::arg("model"), py::arg("original"),
        py::arg("adapter") = "default", py::arg("method") = "loftq", py::arg("iterations") = 1,
        py::arg("sequences") = std::vector<std::vector<int64_t>>{},
        "The same for every place of an adapter on a quantised C++ model.");
  py::class_<models::OriginalWeights>(m, "OriginalWeights",
                                      "The projections of a model's files, one at a time.")
      .def(py::init<std::filesystem::path>(), py::arg("path"))
      .def("matrix", &models::OriginalWeights::matrix, py::arg("path"),
           py::call_guard<py::gil_scoped_release>());
}
