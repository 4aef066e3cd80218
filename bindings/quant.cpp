#include <torch/csrc/utils/pybind.h>
// Not sorted: torch's pybind11 comes first.
#include <pybind11/stl.h>

#include <budwood/peft/tensor_file.h>
#include <budwood/quant/checkpoints/checkpoint.h>
#include <budwood/quant/quantize.h>

namespace py = pybind11;
using namespace budwood::quant;

namespace {

// A weight as operators take it.
using Flat = std::tuple<std::vector<at::Tensor>, int64_t, std::vector<int64_t>>;

Flat flat(const Weight& w) {
  return {w.parts, static_cast<int64_t>(w.format), {w.out, w.in}};
}

Weight weight_of(std::vector<at::Tensor> parts, int64_t format, const std::vector<int64_t>& shape) {
  return Weight::from_parts(std::move(parts), format, shape.at(0), shape.at(1));
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
         const std::string& dtype, int64_t begin, int64_t end) {
        const auto w = weight_of(std::move(parts), format, shape);
        const auto type = dtype == "float64" ? at::kDouble : budwood::scalar_type_of(dtype);
        return w.rows(begin, end < 0 ? w.out : end, type);
      },
      py::arg("parts"), py::arg("format"), py::arg("shape"), py::arg("dtype") = "float32",
      py::arg("begin") = 0, py::arg("end") = -1, py::call_guard<py::gil_scoped_release>(),
      "Rows [begin, end), by default all, of the matrix [out, in] that a weight stands for.");
  m.def(
      "stored_parts",
      [](std::vector<at::Tensor> parts, int64_t format, const std::vector<int64_t>& shape,
         const std::string& dtype) {
        const auto w = weight_of(std::move(parts), format, shape);
        return checkpoint_writer({&w}, budwood::scalar_type_of(dtype)).parts(w);
      },
      py::arg("parts"), py::arg("format"), py::arg("shape"), py::arg("dtype") = "float32",
      "The tensors that hold a packed weight in a file, by their names below the layer's path.");
  m.def(
      "quantization_config",
      [](std::vector<at::Tensor> parts, int64_t format, const std::vector<int64_t>& shape,
         const std::string& dtype, const std::vector<std::string>& plain) {
        const auto w = weight_of(std::move(parts), format, shape);
        return checkpoint_writer({&w}, budwood::scalar_type_of(dtype)).config(plain);
      },
      py::arg("parts"), py::arg("format"), py::arg("shape"), py::arg("dtype"), py::arg("plain"),
      "JSON text of the quantization_config of a model with such weights; plain: layers without.");
  m.def(
      "weight_from_stored",
      [](const StoredParts& parts, const std::string& config, int64_t out, int64_t in) {
        return flat(open_checkpoint(config)->read(parts, out, in));
      },
      py::arg("parts"), py::arg("quantization_config"), py::arg("out"), py::arg("in_"),
      "The opposite of stored_parts, for any supported quant_method.");
}
