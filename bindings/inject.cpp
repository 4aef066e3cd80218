#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <budwood/peft/inject.h>
#include <budwood/peft/models/model.h>

namespace py = pybind11;
using budwood::models::CausalLM;

namespace {

py::dict as_dict(const budwood::InjectReport& report) {
  py::list places;
  for (const auto& place : report.places) {
    py::dict entry;
    entry["path"] = place.path;
    entry["out"] = place.out;
    entry["in"] = place.in;
    entry["rank"] = place.rank;
    entry["parameters"] = place.parameters;
    places.append(entry);
  }
  py::dict result;
  result["places"] = places;
  result["warnings"] = report.warnings;
  result["trainable"] = report.trainable;
  result["total"] = report.total;
  result["summary"] = report.summary();
  return result;
}

}  // namespace

void bind_inject(py::module_& m) {
  m.def(
      "inject",
      [](CausalLM& model, std::shared_ptr<budwood::AdapterConfig> config, const std::string& name,
         uint64_t seed) { return as_dict(budwood::inject(model, config, name, seed)); },
      py::arg("model"), py::arg("config"), py::arg("name") = "default", py::arg("seed") = 0,
      "Attaches adapters to a C++ model and freezes everything else; returns what was done.");
  m.def(
      "detach", [](CausalLM& model, const std::string& name) { budwood::detach(model, name); },
      py::arg("model"), py::arg("name"));
  m.def(
      "set_active",
      [](CausalLM& model, const std::vector<std::string>& names) {
        budwood::set_active(model, names);
      },
      py::arg("model"), py::arg("names"));
  m.def(
      "set_adapters_enabled",
      [](CausalLM& model, bool on) { budwood::set_adapters_enabled(model, on); }, py::arg("model"),
      py::arg("enabled"));
  m.def(
      "merge",
      [](CausalLM& model, const std::vector<std::string>& names) { budwood::merge(model, names); },
      py::arg("model"), py::arg("names") = std::vector<std::string>{"default"},
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "unmerge", [](CausalLM& model) { budwood::unmerge(model); }, py::arg("model"));
  m.def(
      "trainable_parameters", [](CausalLM& model) { return budwood::trainable_parameters(model); },
      py::arg("model"));
  m.def(
      "save_adapter",
      [](CausalLM& model, const std::string& folder, const std::string& name) {
        budwood::save_adapter(model, folder, name);
      },
      py::arg("model"), py::arg("folder"), py::arg("name") = "default",
      py::call_guard<py::gil_scoped_release>(), "The adapter as a folder in HF PEFT's layout.");
  m.def(
      "load_adapter",
      [](CausalLM& model, const std::string& folder, const std::string& name) {
        return as_dict(budwood::load_adapter(model, folder, name));
      },
      py::arg("model"), py::arg("folder"), py::arg("name") = "default");
}
