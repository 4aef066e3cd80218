#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <budwood/peft/convert.h>

namespace py = pybind11;
using namespace budwood;

void bind_convert(py::module_& m) {
  py::class_<ConvertReport>(m, "ConvertReport", "What convert did.")
      .def_readonly("from_format", &ConvertReport::from)
      .def_readonly("modules", &ConvertReport::modules)
      .def_readonly("parameters", &ConvertReport::parameters)
      .def_readonly("warnings", &ConvertReport::warnings);
  m.def(
      "convert",
      [](const std::filesystem::path& adapter, const std::filesystem::path& out,
         const std::string& to, const std::filesystem::path& model, bool overwrite) {
        return convert(
            {.adapter = adapter, .to = to, .model = model, .out = out, .overwrite = overwrite});
      },
      py::arg("adapter"), py::arg("out"), py::kw_only(), py::arg("to") = "peft",
      py::arg("model") = "", py::arg("overwrite") = false, py::call_guard<py::gil_scoped_release>(),
      "Writes a LoRA adapter in another library's files.");
}
