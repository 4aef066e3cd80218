#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <budwood/peft/combine.h>

namespace py = pybind11;
using namespace budwood;

void bind_combine(py::module_& m) {
  py::class_<CombinedModule>(m, "CombinedModule", "One module of a combined adapter.")
      .def_readonly("path", &CombinedModule::path)
      .def_readonly("rank", &CombinedModule::rank)
      .def_readonly("delta_norm", &CombinedModule::delta_norm)
      .def_readonly("error", &CombinedModule::error);
  py::class_<CombineReport>(m, "CombineReport", "What combine did.")
      .def_readonly("modules", &CombineReport::modules)
      .def_readonly("warnings", &CombineReport::warnings);
  m.def(
      "combine",
      [](const std::vector<std::pair<std::filesystem::path, double>>& adapters,
         const std::filesystem::path& out, const std::string& mode, int64_t rank, double density,
         uint64_t seed, bool overwrite) {
        CombineOptions options;
        for (const auto& [path, weight] : adapters) options.adapters.push_back({path, weight});
        options.out = out;
        options.mode = mode;
        options.rank = rank;
        options.density = density;
        options.seed = seed;
        options.overwrite = overwrite;
        return combine(options);
      },
      py::arg("adapters"), py::arg("out"), py::arg("mode") = "cat", py::arg("rank") = 0,
      py::arg("density") = 0.5, py::arg("seed") = 0, py::arg("overwrite") = false,
      py::call_guard<py::gil_scoped_release>(), "Several LoRA adapters into one.");
}
