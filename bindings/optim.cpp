#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <budwood/peft/optim/block_schedule.h>
#include <budwood/peft/optim/fused_backward.h>
#include <budwood/peft/optim/mezo.h>

#include <memory>

namespace py = pybind11;
using namespace budwood::optim;
using budwood::NamedTensors;

namespace {

RuleOptions rule_options(const py::kwargs& given) {
  RuleOptions options;
  const std::map<std::string, double*> numbers = {{"beta1", &options.beta1},
                                                  {"beta2", &options.beta2},
                                                  {"eps", &options.eps},
                                                  {"weight_decay", &options.weight_decay},
                                                  {"scale", &options.scale},
                                                  {"clip_threshold", &options.clip_threshold},
                                                  {"least_scale", &options.least_scale}};
  const std::map<std::string, int64_t*> counts = {{"block_size", &options.block_size},
                                                  {"min_8bit_size", &options.min_8bit_size},
                                                  {"rank", &options.rank},
                                                  {"refresh_every", &options.refresh_every}};
  for (const auto& [key, value] : given) {
    const auto name = key.cast<std::string>();
    if (const auto number = numbers.find(name); number != numbers.end())
      *number->second = value.cast<double>();
    else if (const auto count = counts.find(name); count != counts.end())
      *count->second = value.cast<int64_t>();
    else if (name == "decay_vectors")
      options.decay_vectors = value.cast<bool>();
    else
      throw py::type_error("there is no option " + name);
  }
  return options;
}

/// Tensors with their rule, and a backward that updates them; what the Python classes hold.
struct Fused {
  Optimizer optimizer;
  FusedBackward backward;
  Fused(NamedTensors parameters, const std::string& rule, FusedOptions clip,
        const RuleOptions& options)
      : optimizer(std::move(parameters), make_rule(rule, options)), backward(optimizer, clip) {}
};

void bind_rules(py::module_& m) {
  py::class_<UpdateRule, std::shared_ptr<UpdateRule>>(m, "UpdateRule",
                                                      "How one tensor changes, given its gradient.")
      .def(py::init([](const std::string& name, const py::kwargs& options) {
             return std::const_pointer_cast<UpdateRule>(make_rule(name, rule_options(options)));
           }),
           py::arg("name"))
      .def(
          "fresh",
          [](const UpdateRule& rule, const at::Tensor& p, const std::string& path) {
            return rule.rule_for(path, p).fresh(p);
          },
          py::arg("p"), py::arg("path") = "", "What is remembered before the first update.")
      .def(
          "update",
          [](const UpdateRule& rule, const at::Tensor& p, const at::Tensor& grad, TensorState state,
             double rate, const std::string& path) {
            const at::NoGradGuard no_grad;
            rule.rule_for(path, p).update(p, grad, state, rate);
            return state;
          },
          py::arg("p"), py::arg("grad"), py::arg("state"), py::arg("rate"), py::arg("path") = "",
          py::call_guard<py::gil_scoped_release>(),
          "One update of p in place; returns what is remembered after it.");
  m.def("update_rules", &rule_names);

  py::class_<Optimizer>(m, "Optimizer", "Named tensors, their rule and what it remembers.")
      .def(
          py::init([](NamedTensors parameters, const std::string& rule, const py::kwargs& options) {
            return std::make_unique<Optimizer>(std::move(parameters),
                                               make_rule(rule, rule_options(options)));
          }),
          py::arg("parameters"), py::arg("rule"))
      .def("step", &Optimizer::step, py::arg("rate"), py::call_guard<py::gil_scoped_release>())
      .def("state", &Optimizer::state)
      .def("restore", &Optimizer::restore, py::arg("state"));

  py::class_<Fused>(m, "FusedBackward", "Backward and update in one; see fused_backward.h.")
      .def(py::init([](NamedTensors parameters, const std::string& rule, double clip_norm,
                       double clip_value, const py::kwargs& options) {
             return std::make_unique<Fused>(std::move(parameters), rule,
                                            FusedOptions{clip_norm, clip_value},
                                            rule_options(options));
           }),
           py::arg("parameters"), py::arg("rule"), py::kw_only(), py::arg("clip_norm") = 0.0,
           py::arg("clip_value") = 0.0)
      .def(
          "backward",
          [](Fused& fused, const at::Tensor& loss, double rate) {
            FusedBackward::Result result;
            {
              const py::gil_scoped_release released;
              result = fused.backward.backward(loss, rate);
            }
            return py::make_tuple(result.norm, result.skipped, result.updated);
          },
          py::arg("loss"), py::arg("rate"),
          "(norm of the gradients or 0, whether the step was skipped, tensors updated).")
      .def_property_readonly("loss_scale",
                             [](const Fused& fused) { return fused.backward.loss_scale(); })
      .def("state",
           [](const Fused& fused) {
             auto all = fused.optimizer.state();
             for (auto& named : fused.backward.state()) all.push_back(std::move(named));
             return all;
           })
      .def(
          "restore",
          [](Fused& fused, const NamedTensors& state) {
            fused.optimizer.restore(state);
            fused.backward.restore(state);
          },
          py::arg("state"));
}

void bind_mezo_and_blocks(py::module_& m) {
  py::class_<MezoLog>(m, "MezoLog", "What a MeZO run was: a scalar and a rate for each step.")
      .def_static("load", &MezoLog::load, py::arg("path"))
      .def("save", &MezoLog::save, py::arg("path"))
      .def_readonly("projected", &MezoLog::projected)
      .def_readonly("rates", &MezoLog::rates)
      .def_readonly("names", &MezoLog::names)
      .def_property_readonly("eps", [](const MezoLog& log) { return log.options.eps; })
      .def_property_readonly("seed", [](const MezoLog& log) { return log.options.seed; });

  py::class_<Mezo>(m, "Mezo", "Gradient descent from two losses; see mezo.h.")
      .def(py::init([](NamedTensors parameters, double eps, double weight_decay, uint64_t seed) {
             return std::make_unique<Mezo>(std::move(parameters),
                                           MezoOptions{eps, weight_decay, seed});
           }),
           py::arg("parameters"), py::arg("eps"), py::arg("weight_decay"), py::arg("seed"))
      .def("step", &Mezo::step, py::arg("loss"), py::arg("rate"))
      .def_property_readonly("log", &Mezo::log)
      .def("state", &Mezo::state)
      .def("restore", &Mezo::restore, py::arg("state"));
  m.def("mezo_replay", &Mezo::replay, py::arg("parameters"), py::arg("log"),
        py::call_guard<py::gil_scoped_release>());

  py::class_<BlockSchedule>(m, "BlockSchedule", "Which blocks are trained when.")
      .def(py::init([](const NamedTensors& parameters, const std::string& kind, int64_t active,
                       int64_t every, const std::string& order, uint64_t seed) {
             return BlockSchedule(parameters, {kind, active, every, order, seed});
           }),
           py::arg("parameters"), py::arg("kind"), py::arg("active"), py::arg("every"),
           py::arg("order"), py::arg("seed"))
      .def("active", &BlockSchedule::active, py::arg("step"))
      .def("apply", &BlockSchedule::apply, py::arg("optimizer"), py::arg("step"))
      .def("thaw", &BlockSchedule::thaw)
      .def_property_readonly("blocks", &BlockSchedule::blocks)
      .def_property_readonly("never_trained", &BlockSchedule::never_trained);
}

}  // namespace

void bind_optim(py::module_& m) {
  bind_rules(m);
  bind_mezo_and_blocks(m);
}
