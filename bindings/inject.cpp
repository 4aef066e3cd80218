#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "mirror.h"

#include <budwood/peft/adapterhub.h>
#include <budwood/peft/inject.h>
#include <budwood/peft/inject_matched.h>
#include <budwood/peft/models/bert.h>
#include <budwood/peft/models/model.h>
#include <budwood/peft/row_groups.h>

namespace py = pybind11;
using budwood::models::CausalLM;

namespace {

py::dict as_dict(const budwood::InjectReport& report) {
  py::list places;
  for (const auto& place : report.places) {
    py::dict entry;
    entry["path"] = place.path;
    entry["kind"] = place.kind;
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

// A scope of C++ as a context manager.
class UseAdapters {
 public:
  UseAdapters(std::shared_ptr<torch::nn::Module> model, budwood::RowGroups groups)
      : model_(std::move(model)), groups_(std::move(groups)) {}
  void enter() { scope_.emplace(*model_, groups_); }
  void exit() { scope_.reset(); }

 private:
  std::shared_ptr<torch::nn::Module> model_;  // kept alive by this, whatever pybind11's version
  budwood::RowGroups groups_;
  std::optional<budwood::UseAdapters> scope_;
};

// The same functions for a C++ model and for the slots of a Python one.
template <class Model>
void bind_for(py::module_& m) {
  m.def(
      "inject",
      [](Model& model, std::shared_ptr<budwood::AdapterConfig> config, const std::string& name,
         uint64_t seed, bool strict) {
        return as_dict(budwood::inject_matched(
            model, config, name, seed,
            strict ? budwood::Strictness::strict : budwood::Strictness::lenient));
      },
      py::arg("model"), py::arg("config"), py::arg("name") = "default", py::arg("seed") = 0,
      py::arg("strict") = true,
      "Attaches adapters to a C++ model and freezes everything else; returns what was done.");
  m.def(
      "detach", [](Model& model, const std::string& name) { budwood::detach(model, name); },
      py::arg("model"), py::arg("name"));
  m.def(
      "set_active",
      [](Model& model, const std::vector<std::string>& names, const std::string& composition) {
        budwood::set_active(model, names, budwood::composition_of(composition));
      },
      py::arg("model"), py::arg("names"), py::arg("composition") = "stack");
  m.def(
      "set_weight",
      [](Model& model, const std::string& name, double weight) {
        budwood::set_weight(model, name, weight);
      },
      py::arg("model"), py::arg("name"), py::arg("weight"),
      "Multiplies what an adapter changes at every place.");
  m.def(
      "set_adapters_enabled",
      [](Model& model, bool on) { budwood::set_adapters_enabled(model, on); }, py::arg("model"),
      py::arg("enabled"));
  m.def(
      "merge",
      [](Model& model, const std::vector<std::string>& names) { budwood::merge(model, names); },
      py::arg("model"), py::arg("names") = std::vector<std::string>{"default"},
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "unmerge", [](Model& model) { budwood::unmerge(model); }, py::arg("model"));
  m.def(
      "use_adapters",
      [](const std::shared_ptr<Model>& model, const std::vector<int64_t>& cu_seqlens,
         const std::vector<std::string>& names) {
        return std::make_unique<UseAdapters>(model, budwood::row_groups(cu_seqlens, names));
      },
      py::arg("model"), py::arg("cu_seqlens"), py::arg("names"),
      "A context in which sequence s uses the adapter names[s]; \"\" is the bare base.");
  m.def(
      "trainable_parameters", [](Model& model) { return budwood::trainable_parameters(model); },
      py::arg("model"));
  m.def(
      "penalty",
      [](Model& model) -> std::optional<at::Tensor> {
        const auto term = budwood::penalty(model);
        return term.defined() ? std::optional(term) : std::nullopt;
      },
      py::arg("model"), "What active adapters add to the loss, or None.");
  m.def(
      "before_step", [](Model& model, int64_t step) { budwood::before_step(model, step); },
      py::arg("model"), py::arg("step"), "Before the forward of an optimiser step.");
  m.def(
      "after_step", [](Model& model, int64_t step) { budwood::after_step(model, step); },
      py::arg("model"), py::arg("step"), "After the update of an optimiser step.");
  m.def(
      "adapter_tensors",
      [](Model& model, const std::string& name) { return budwood::adapter_tensors(model, name); },
      py::arg("model"), py::arg("name"), "The tensors of an adapter by the key in its file.");
  m.def(
      "adapter_config",
      [](Model& model, const std::string& name) { return budwood::adapter_config(model, name); },
      py::arg("model"), py::arg("name"), "The configuration of an adapter as it is saved.");
  m.def(
      "set_adapter_tensors",
      [](Model& model, const std::vector<std::pair<std::string, at::Tensor>>& tensors,
         const std::string& source,
         const std::string& name) { budwood::set_adapter_tensors(model, tensors, source, name); },
      py::arg("model"), py::arg("tensors"), py::arg("source"), py::arg("name") = "default");
  m.def(
      "save_adapter",
      [](Model& model, const std::string& folder, const std::string& name) {
        budwood::save_adapter(model, folder, name);
      },
      py::arg("model"), py::arg("folder"), py::arg("name") = "default",
      py::call_guard<py::gil_scoped_release>(), "The adapter as a folder in HF PEFT's layout.");
  m.def(
      "save_adapterhub",
      [](Model& model, const std::string& folder, const std::string& name) {
        budwood::save_adapterhub(model, folder, name);
      },
      py::arg("model"), py::arg("folder"), py::arg("name") = "default",
      py::call_guard<py::gil_scoped_release>(), "The adapter as a folder of AdapterHub's.");
  m.def(
      "read_adapterhub",
      [](Model& model, const std::string& folder, const std::string& name) {
        budwood::read_adapterhub(model, folder, name);
      },
      py::arg("model"), py::arg("folder"), py::arg("name"));
  m.def(
      "load_adapter",
      [](Model& model, const std::string& folder, const std::string& name) {
        return as_dict(budwood::load_adapter(model, folder, name));
      },
      py::arg("model"), py::arg("folder"), py::arg("name") = "default");
}

}  // namespace

void bind_inject(py::module_& m) {
  m.def("is_adapterhub_folder",
        [](const std::string& folder) { return budwood::is_adapterhub_folder(folder); });
  m.def("adapterhub_config", &budwood::adapterhub_config, py::arg("text"),
        "What the text of AdapterHub's adapter_config.json is here.");
  py::class_<UseAdapters>(m, "UseAdapters")
      .def("__enter__", &UseAdapters::enter)
      .def("__exit__", [](UseAdapters& scope, const py::args&) { scope.exit(); });
  bind_for<CausalLM>(m);
  bind_for<budwood::models::Bert>(m);
  bind_for<Mirror>(m);
}
