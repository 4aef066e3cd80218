#include <pybind11/eval.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <budwood/peft/config.h>
#include <budwood/peft/json.h>
#include <budwood/peft/methods/adalora_config.h>
#include <budwood/peft/methods/bottleneck_config.h>
#include <budwood/peft/methods/dylora_config.h>
#include <budwood/peft/methods/ia3_config.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/methods/peqa_config.h>
#include <budwood/peft/methods/prompt_config.h>
#include <budwood/peft/methods/reft_config.h>
#include <budwood/peft/methods/vera_config.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

namespace py = pybind11;
using budwood::AdapterConfig;
using budwood::Json;
using budwood::Strictness;

namespace {

// HF PEFT keeps these lists as sets.
const std::set<std::string> kSets = {"target_modules", "exclude_modules", "feedforward_modules"};

// A list, set or dict that an option hands out stores every change back into the option.
constexpr const char* kLive = R"(
def live(kind, mutators):
    def wrap(name):
        plain = getattr(kind, name)
        def method(self, *args, **kwargs):
            result = plain(self, *args, **kwargs)
            setattr(self._owner, self._option, kind(self))
            return result
        method.__name__ = name
        return method
    body = {name: wrap(name) for name in mutators.split()}
    body["__reduce__"] = lambda self: (kind, (kind(self),))
    return type(kind.__name__, (kind,), body)

live_list = live(list, "append extend insert remove pop clear sort reverse "
                       "__setitem__ __delitem__ __iadd__ __imul__")
live_dict = live(dict, "pop popitem clear update setdefault __setitem__ __delitem__ __ior__")
live_set = live(set, "add remove discard pop clear update intersection_update difference_update "
                     "symmetric_difference_update __ior__ __iand__ __isub__ __ixor__")
)";
py::dict* live_types = nullptr;

Json to_json(py::handle value) {
  PyObject* object = value.ptr();
  if (value.is_none()) return nullptr;
  if (PyBool_Check(object)) return object == Py_True;
  if (PyUnicode_Check(object)) return value.cast<std::string>();
  if (PyFloat_Check(object)) return PyFloat_AS_DOUBLE(object);
  if (PyDict_Check(object)) {
    Json result = Json::object();
    for (const auto& [key, item] : py::reinterpret_borrow<py::dict>(value)) {
      if (!PyUnicode_Check(key.ptr()))
        throw budwood::Error(
            "config", fmt::format("the key {} is not a text", py::repr(key).cast<std::string>()));
      result[key.cast<std::string>()] = to_json(item);
    }
    return result;
  }
  if (PyAnySet_Check(object)) {
    // A set has no order of its own, and a file should not depend on the run.
    py::dict by_text;
    by_text["key"] = py::module_::import("builtins").attr("str");
    return to_json(py::module_::import("builtins").attr("sorted")(value, **by_text));
  }
  if (PyList_Check(object) || PyTuple_Check(object)) {
    Json result = Json::array();
    for (const auto item : py::iter(value)) result.push_back(to_json(item));
    return result;
  }
  if (PyIndex_Check(object)) {  // int, and the integers of numpy and torch
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(object));
    if (!number) throw py::error_already_set();
    int overflow = 0;
    const long long small = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    return overflow ? Json(number.attr("__float__")().cast<double>()) : Json(small);
  }
  if (py::hasattr(value, "value") && py::hasattr(value, "name"))
    return to_json(value.attr("value"));
  if (py::hasattr(value, "__float__")) return py::float_(value.attr("__float__")()).cast<double>();
  throw budwood::Error(
      "config",
      fmt::format("a value of type {} cannot be used: {}",
                  py::str(py::type::handle_of(value).attr("__name__")).cast<std::string>(),
                  py::repr(value).cast<std::string>()));
}

py::object to_python(const Json& value) {
  switch (value.type()) {
    case Json::value_t::boolean:
      return py::bool_(value.get<bool>());
    case Json::value_t::number_integer:
    case Json::value_t::number_unsigned:
      return py::int_(value.get<int64_t>());
    case Json::value_t::number_float:
      return py::float_(value.get<double>());
    case Json::value_t::string:
      return py::str(value.get<std::string>());
    case Json::value_t::array: {
      py::list list;
      for (const auto& item : value) list.append(to_python(item));
      return list;
    }
    case Json::value_t::object: {
      py::dict dict;
      for (const auto& [key, item] : value.items()) dict[py::str(key)] = to_python(item);
      return dict;
    }
    default:
      return py::none();
  }
}

py::object option_value(const std::string& name, const Json& value) {
  auto object = to_python(value);
  return value.is_array() && kSets.contains(name) ? py::object(py::set(object)) : object;
}

py::object live_value(const py::object& self, const std::string& name, const Json& value) {
  const auto plain = option_value(name, value);
  const char* kind = PyAnySet_Check(plain.ptr()) ? "live_set"
                     : value.is_array()          ? "live_list"
                     : value.is_object()         ? "live_dict"
                                                 : nullptr;
  if (!kind) return plain;
  py::object live = (*live_types)[kind](plain);
  live.attr("_owner") = self;
  live.attr("_option") = name;
  return live;
}

Json written(AdapterConfig& config, const std::string& name) {
  for (const auto& field : config.fields())
    if (field.name == name) return field.write();
  throw budwood::Error("config", name);
}

void warn(const AdapterConfig& config) {
  for (const auto& text : config.warnings)
    if (PyErr_WarnEx(PyExc_UserWarning, text.c_str(), 2) != 0) throw py::error_already_set();
}

std::string repr(const py::object& self, AdapterConfig& config, AdapterConfig& plain) {
  std::string text = py::str(py::type::handle_of(self).attr("__name__"));
  text += '(';
  const auto defaults = plain.fields();
  size_t i = 0;
  for (const auto& field : config.fields()) {
    const auto value = field.write();
    if (value == defaults[i++].write()) continue;
    if (text.back() != '(') text += ", ";
    text += field.name + "=" + py::repr(option_value(field.name, value)).cast<std::string>();
  }
  return text + ")";
}

using Fields = std::vector<budwood::ConfigField>;

template <class T>
void add_options(T& type, const Fields& fields, const Fields& inherited = {}) {
  for (const auto& field : fields) {
    const auto name = field.name;
    if (std::any_of(inherited.begin(), inherited.end(), [&](auto& f) { return f.name == name; }))
      continue;
    type.def_property(
        name.c_str(),
        [name](const py::object& self) {
          return live_value(self, name, written(self.cast<AdapterConfig&>(), name));
        },
        [name](AdapterConfig& self, const py::object& value) {
          budwood::set_field(self, name, to_json(value));
        });
  }
}

template <class T>
auto bind_method(py::module_& m, const char* name, const char* doc) {
  py::class_<T, AdapterConfig, std::shared_ptr<T>> type(m, name, doc);
  T example;
  add_options(type, example.fields(), example.AdapterConfig::fields());
  type.def_static(
      "defaults", [] { return std::make_shared<T>(); },
      "The configuration with its default values, whether they are enough or not.");
  type.def(
      "option_names",
      [](T& self) {
        std::vector<std::string> names;
        for (const auto& field : self.fields()) names.push_back(field.name);
        return names;
      },
      "All options, those that stand in no file unless they are set, too.");
  type.def(py::init([](const py::kwargs& options) {
    auto config = std::make_shared<T>();
    budwood::set_fields(*config, to_json(options), Strictness::strict);
    config->validate();
    return config;
  }));
  type.def("__repr__", [](const py::object& self) {
    T plain;
    return repr(self, self.cast<T&>(), plain);
  });
  type.def("copy", [](const T& self) { return T(self); });
  type.def(py::pickle([](const T& self) { return budwood::all_fields(self).dump(); },
                      [](const std::string& state) {
                        auto config = std::make_shared<T>();
                        budwood::set_fields(*config, Json::parse(state), Strictness::lenient);
                        return config;
                      }));
  return type;
}

}  // namespace

void bind_config(py::module_& m) {
  live_types = new py::dict();
  (*live_types)["__builtins__"] = py::module_::import("builtins");
  py::exec(kLive, *live_types);

  py::class_<AdapterConfig, std::shared_ptr<AdapterConfig>> base(
      m, "PeftConfig", "What all configurations have; from_pretrained makes the right kind.");
  base.def_readonly("peft_type", &AdapterConfig::peft_type);
  budwood::LoraConfig example;
  add_options(base, example.AdapterConfig::fields());
  base.def_readonly("warnings", &AdapterConfig::warnings,
                    "What reading a saved configuration had to say.");
  base.def_property_readonly("is_prompt_learning", &AdapterConfig::is_prompt_learning);
  base.def(
      "validate",
      [](const AdapterConfig& self, bool strict) {
        self.validate(strict ? Strictness::strict : Strictness::lenient);
      },
      py::arg("strict") = true,
      "Raises Error for a value or a combination that means nothing or is not available.");
  base.def("to_json", &AdapterConfig::to_json, "The text of adapter_config.json.");
  base.def(
      "to_dict",
      [](AdapterConfig& self) {
        py::dict dict;
        const auto fields = budwood::all_fields(self);
        for (const auto& [key, value] : fields.items())
          dict[py::str(key)] = option_value(key, value);
        return dict;
      },
      "All options by name; lists of modules as sets.");
  base.def("__eq__", [](const AdapterConfig& self, const py::object& other) {
    return py::isinstance<AdapterConfig>(other) &&
           self.to_json() == other.cast<const AdapterConfig&>().to_json();
  });
  base.def_static(
      "from_json",
      [](const std::string& text, bool strict) {
        auto config = budwood::parse_adapter_config(
            text, strict ? Strictness::strict : Strictness::lenient, "the text");
        warn(*config);
        return config;
      },
      py::arg("text"), py::arg("strict") = true);
  base.def(
      "save_pretrained",
      [](const AdapterConfig& self, const py::object& folder) {
        budwood::save_adapter_config(self, py::str(folder).cast<std::string>());
      },
      py::arg("save_directory"), "Writes adapter_config.json into a folder.");
  base.def_static(
      "from_pretrained",
      [](const py::object& folder, const std::optional<std::string>& subfolder) {
        std::filesystem::path path = py::str(folder).cast<std::string>();
        if (subfolder) path /= *subfolder;
        auto config = budwood::load_adapter_config(path);
        warn(*config);
        return config;
      },
      py::arg("pretrained_model_name_or_path"), py::arg("subfolder") = py::none(),
      "Reads adapter_config.json of a local folder; nothing is ever downloaded.");

  bind_method<budwood::LoraConfig>(
      m, "LoraConfig", "LoRA with HF PEFT's arguments: LoraConfig(r=8, lora_alpha=16, ...).")
      .def("rank", &budwood::LoraConfig::rank, py::arg("path"), "The rank at a module path.")
      .def("alpha", &budwood::LoraConfig::alpha, py::arg("path"))
      .def("scaling", &budwood::LoraConfig::scaling, py::arg("path"),
           "alpha / rank, or alpha / sqrt(rank) with use_rslora.")
      .def("pin_patterns", &budwood::LoraConfig::pin_patterns, py::arg("paths"),
           "Makes rank_pattern and alpha_pattern mean the same after they are sorted in a file.");

  bind_method<budwood::IA3Config>(m, "IA3Config",
                                  "IA3 (arXiv 2205.05638) with HF PEFT's arguments.");
  bind_method<budwood::PeqaConfig>(m, "PeqaConfig",
                                   "PEQA (arXiv 2305.14152): the scales of integer weights.");
  bind_method<budwood::VeraConfig>(m, "VeraConfig",
                                   "VeRA (arXiv 2310.11454) with HF PEFT's arguments.");
  bind_method<budwood::AdaLoraConfig>(m, "AdaLoraConfig",
                                      "AdaLoRA (arXiv 2303.10512) with HF PEFT's arguments.");
  bind_method<budwood::DyLoraConfig>(
      m, "DyLoraConfig", "DyLoRA (arXiv 2210.07558): LoRA that works at every rank up to r.");
  bind_method<budwood::BottleneckConfig>(
      m, "BottleneckConfig",
      "Bottleneck adapters with AdapterHub's options; the defaults are Pfeiffer's.")
      .def_static(
          "houlsby",
          [](const py::kwargs& options) {
            auto config =
                std::make_shared<budwood::BottleneckConfig>(budwood::BottleneckConfig::houlsby());
            budwood::set_fields(*config, to_json(options), Strictness::strict);
            config->validate();
            return config;
          },
          "After attention and after the feed-forward part (arXiv 1902.00751).");
  bind_method<budwood::ParallelAdapterConfig>(
      m, "ParallelAdapterConfig", "Bottlenecks beside the sub-layers (arXiv 2110.04366).");
  bind_method<budwood::CompacterConfig>(
      m, "CompacterConfig", "Compacter (arXiv 2106.04647); mh_adapter=False is Compacter++.");
  bind_method<budwood::PromptTuningConfig>(
      m, "PromptTuningConfig",
      "Prompt tuning (arXiv 2104.08691) with HF PEFT's arguments, and placement: \"front\",\n"
      "\"after_bos\", \"end\", a token's index, or groups as \"front:4,7:2,end:8\".");
  bind_method<budwood::PromptEncoderConfig>(
      m, "PromptEncoderConfig", "P-tuning (arXiv 2103.10385); placement as in PromptTuningConfig.");
  bind_method<budwood::PrefixTuningConfig>(
      m, "PrefixTuningConfig", "Prefix tuning (arXiv 2101.00190) with HF PEFT's arguments.");
  bind_method<budwood::AdaptionPromptConfig>(
      m, "AdaptionPromptConfig", "LLaMA-Adapter (arXiv 2303.16199) with HF PEFT's arguments.");
  bind_method<budwood::ReftConfig>(
      m, "ReftConfig", "ReFT (arXiv 2404.03592): edits of hidden states at chosen positions.");

  m.def("task_heads", &budwood::task_heads, py::arg("task_type"),
        "The heads that are trained with a task.");
  m.def("known_peft_types", &budwood::known_peft_types);
}
