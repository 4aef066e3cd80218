#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <budwood/peft/extract.h>

namespace py = pybind11;
using namespace budwood;

void bind_extract(py::module_& m) {
  py::class_<ExtractedModule>(m, "ExtractedModule", "What was taken out of one projection.")
      .def_readonly("path", &ExtractedModule::path)
      .def_readonly("rank", &ExtractedModule::rank)
      .def_readonly("delta_norm", &ExtractedModule::delta_norm)
      .def_readonly("energy", &ExtractedModule::energy);
  py::class_<LostTensor>(m, "LostTensor", "A difference that the adapter does not have.")
      .def_readonly("name", &LostTensor::name)
      .def_readonly("delta_norm", &LostTensor::delta_norm);
  py::class_<ExtractReport>(m, "ExtractReport", "What extract did.")
      .def_readonly("modules", &ExtractReport::modules)
      .def_readonly("identical", &ExtractReport::identical)
      .def_readonly("lost", &ExtractReport::lost)
      .def_readonly("parameters", &ExtractReport::parameters);
  m.def(
      "extract",
      [](const std::filesystem::path& base, const std::filesystem::path& tuned,
         const std::filesystem::path& out, int64_t rank, double energy,
         const std::vector<std::string>& targets, bool overwrite) {
        ExtractOptions options;
        options.base = base;
        options.tuned = tuned;
        options.out = out;
        options.rank = rank;
        options.energy = energy;
        options.targets = targets;
        options.overwrite = overwrite;
        return extract(options);
      },
      py::arg("base"), py::arg("tuned"), py::arg("out"), py::arg("rank") = 0,
      py::arg("energy") = 0.0, py::arg("targets") = std::vector<std::string>(),
      py::arg("overwrite") = false, py::call_guard<py::gil_scoped_release>(),
      "The difference of two models as LoRA factors.");
}
