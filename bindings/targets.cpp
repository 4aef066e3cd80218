#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <budwood/peft/targets.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <tuple>

namespace py = pybind11;
using budwood::ModuleInfo;
using budwood::ModuleKind;
using budwood::Strictness;

namespace {

using Module = std::tuple<std::string, std::string, bool>;

ModuleKind kind_of(const std::string& name) {
  if (name == "linear") return ModuleKind::linear;
  if (name == "conv1d") return ModuleKind::conv1d;
  if (name == "embedding") return ModuleKind::embedding;
  if (name == "convolution") return ModuleKind::convolution;
  if (name == "other") return ModuleKind::other;
  throw budwood::Error("match_targets", fmt::format("the kind of a module is '{}'; it must be "
                                                    "linear, conv1d, embedding or other",
                                                    name));
}

// As HF PEFT's configurations hold it: a set, a text or None.
py::object as_python(const budwood::Names& names) {
  if (const auto* text = std::get_if<std::string>(&names)) return py::str(*text);
  const auto* list = std::get_if<std::vector<std::string>>(&names);
  return list ? py::object(py::set(py::cast(*list))) : py::none();
}

py::dict match(const budwood::AdapterConfig& config, const std::vector<Module>& modules,
               const std::string& model_type, bool strict) {
  std::vector<ModuleInfo> infos;
  for (const auto& [path, kind, is_output] : modules)
    infos.push_back({path, kind_of(kind), is_output});
  const auto report = budwood::match_targets(config, infos, model_type,
                                             strict ? Strictness::strict : Strictness::lenient);
  py::dict hits;
  for (const auto& [option, pattern, count] : report.hits)
    hits[py::make_tuple(option, pattern)] = count;
  py::dict result;
  result["matched"] = report.matched;
  result["hits"] = hits;
  result["warnings"] = report.warnings;
  result["target_modules"] = as_python(report.target_modules);
  return result;
}

}  // namespace

void bind_targets(py::module_& m) {
  m.def(
      "match_targets", match, py::arg("config"), py::arg("modules"), py::arg("model_type") = "",
      py::arg("strict") = true,
      "Which modules a configuration targets.\n\n"
      "modules: (path, kind, is_output_embedding) of all named modules of the base model; kind is\n"
      "linear, conv1d, embedding or other. Returns matched (paths), hits ((option, entry) ->\n"
      "count), warnings, and target_modules as it is to be saved.");
  m.def(
      "default_target_modules",
      [](const std::string& peft_type, const std::string& model_type) -> py::object {
        const auto names = budwood::default_target_modules(peft_type, model_type);
        return names ? as_python(*names) : py::none();
      },
      py::arg("peft_type"), py::arg("model_type"),
      "HF PEFT's target_modules for a model type; None when it has none.");
  m.def("default_feedforward_modules", &budwood::default_feedforward_modules,
        py::arg("model_type"));
  m.def("minimal_suffixes", &budwood::minimal_suffixes, py::arg("targets"), py::arg("others"),
        "The fewest, shortest path ends that hold for all targets and for none of the others.");
}
