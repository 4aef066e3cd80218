#include <torch/csrc/utils/pybind.h>
// Not sorted: torch's pybind11 comes first.
#include <pybind11/stl.h>

#include <budwood/peft/tensor_file.h>
#include <budwood/quant/device_products.h>
#include <budwood/quant/quantize.h>

namespace py = pybind11;
using namespace budwood::quant;

namespace {

// A weight as operators take it.
using Flat = std::tuple<std::vector<at::Tensor>, int64_t, std::vector<int64_t>>;

Flat flat(const Weight& w) {
  return {w.parts, static_cast<int64_t>(w.format), {w.out, w.in}};
}

}  // namespace

void bind_quant(py::module_& m) {
  m.def(
      "quantize",
      [](const at::Tensor& w, const std::string& format, int64_t block_size, bool double_quant) {
        return flat(quantize(w, {format, block_size, double_quant}));
      },
      py::arg("weight"), py::arg("format") = "nf4", py::arg("block_size") = 64,
      py::arg("double_quant") = false, py::call_guard<py::gil_scoped_release>(),
      "A matrix [out, in] to (parts, format, [out, in]), as torch.ops.budwood.linear takes it.\n\n"
      "format: 'nf4', 'fp4', 'int8', 'int4' or 'affine8'.");
  m.def(
      "dequantize",
      [](std::vector<at::Tensor> parts, int64_t format, const std::vector<int64_t>& shape,
         const std::string& dtype) {
        const auto w = Weight::from_parts(std::move(parts), format, shape.at(0), shape.at(1));
        return w.rows(0, w.out, budwood::scalar_type_of(dtype));
      },
      py::arg("parts"), py::arg("format"), py::arg("shape"), py::arg("dtype") = "float32",
      py::call_guard<py::gil_scoped_release>(), "The matrix [out, in] that a weight stands for.");
  m.def("packed_devices", &packed_devices,
        "Kinds of devices on which this build multiplies packed weights, 'cpu' first.");
}
