#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <budwood/peft/models/calibrate.h>
#include <cmath>

namespace py = pybind11;
using namespace budwood::models;

namespace {

py::object number(double value) {
  return std::isnan(value) ? py::object(py::none()) : py::float_(value);
}

py::dict dict_of(const LayerReport& layer) {
  py::dict d;
  d["path"] = layer.path;
  d["rtn_error"] = number(layer.rtn_error);
  d["error"] = number(layer.error);
  d["rtn_weight_error"] = layer.rtn_weight_error;
  d["weight_error"] = layer.weight_error;
  d["awq_ratio"] = layer.awq_ratio;
  return d;
}

py::list run_calibrate(CausalLM& model, const std::vector<std::vector<int64_t>>& sequences,
                       CalibrateOptions options, const py::object& callback) {
  // A Python callback runs under the lock; a signal handler's exception ends the calibration.
  options.progress = [&callback](int64_t done, int64_t total, const std::string& path) {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!callback.is_none()) callback(done, total, path);
  };
  CalibrateReport report;
  {
    py::gil_scoped_release released;
    report = calibrate(model, sequences, options);
  }
  py::list layers;
  for (const auto& layer : report.layers) layers.append(dict_of(layer));
  return layers;
}

}  // namespace

void bind_calibrate(py::module_& m) {
  const CalibrateOptions defaults;
  m.def(
      "calibrate",
      [](CausalLM& model, const std::vector<std::vector<int64_t>>& sequences,
         const std::string& method, const std::string& format, int64_t bits, int64_t group_size,
         bool symmetric, bool act_order, bool static_groups, bool double_quant, double damping,
         std::vector<std::string> skip, int64_t batch_tokens, int64_t search_tokens,
         const py::object& callback) {
        return run_calibrate(model, sequences,
                             {.method = method,
                              .format = format,
                              .bits = bits,
                              .group_size = group_size,
                              .symmetric = symmetric,
                              .act_order = act_order,
                              .static_groups = static_groups,
                              .double_quant = double_quant,
                              .damping = damping,
                              .skip = std::move(skip),
                              .batch_tokens = batch_tokens,
                              .search_tokens = search_tokens},
                             callback);
      },
      py::arg("model"), py::arg("sequences"), py::kw_only(), py::arg("method") = defaults.method,
      py::arg("format") = defaults.format, py::arg("bits") = defaults.bits,
      py::arg("group_size") = defaults.group_size, py::arg("symmetric") = defaults.symmetric,
      py::arg("act_order") = defaults.act_order, py::arg("static_groups") = defaults.static_groups,
      py::arg("double_quant") = defaults.double_quant, py::arg("damping") = defaults.damping,
      py::arg("skip") = defaults.skip, py::arg("batch_tokens") = defaults.batch_tokens,
      py::arg("search_tokens") = defaults.search_tokens, py::arg("callback") = py::none(),
      "Quantises a loaded model in place, block by block, to group-affine integers or, with\n"
      "method 'gptq' or 'rtn', to format 'nf4' or 'fp4' in blocks of group_size.\n\n"
      "method: 'gptq' and 'awq' look at the token sequences, 'hqq' and 'rtn' do not need any.\n"
      "Returns a dict for each projection: path, the relative output error of plain rounding and\n"
      "of the method over the sequences, the same of the weight, and AWQ's exponent.\n"
      "callback(blocks done, blocks in all, path) is called after each block.");
}
