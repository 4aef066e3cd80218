#include <torch/csrc/utils/pybind.h>
// Not sorted: torch's pybind11 comes first.
#include <pybind11/stl.h>

#include <budwood/peft/tensor_file.h>
#include <budwood/quant/checkpoints/awq.h>
#include <budwood/quant/checkpoints/checkpoint.h>
#include <budwood/quant/checkpoints/gptq.h>
#include <budwood/quant/device_products.h>
#include <budwood/quant/memory_pool.h>
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
      "enter_memory_pool", [] { return std::make_unique<MemoryPool>(); },
      "Memory of CPU tensors is handed out again while the returned object lives.");
  m.def("memory_pool_statistics", [] {
    const auto now = memory_pool_statistics();
    py::dict d;
    d["used"] = now.used;
    d["free"] = now.free;
    d["peak"] = now.peak;
    return d;
  });
  py::class_<MemoryPool>(m, "MemoryPool");
  m.def(
      "quantize",
      [](const at::Tensor& w, const std::string& format, int64_t block_size, bool double_quant,
         bool symmetric, const std::string& method) {
        return flat(quantize(w, {format, block_size, double_quant, symmetric, method}));
      },
      py::arg("weight"), py::arg("format") = "nf4", py::arg("block_size") = 64,
      py::arg("double_quant") = false, py::arg("symmetric") = false, py::arg("method") = "rtn",
      py::call_guard<py::gil_scoped_release>(),
      "A matrix [out, in] to (parts, format, [out, in]), as torch.ops.budwood.linear takes it.\n\n"
      "format: 'nf4', 'fp4', 'int8', 'int4' or 'affine8'. method: 'rtn', or 'hqq' for the last "
      "two.");
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
  m.def(
      "weight_from_gptq",
      [](const at::Tensor& qweight, const at::Tensor& qzeros, const at::Tensor& scales,
         const std::optional<at::Tensor>& g_idx, int64_t bits, int64_t group_size, bool v2,
         int64_t out, int64_t in) {
        return flat(
            weight_from_gptq(qweight, qzeros, scales, g_idx, bits, group_size, v2, out, in));
      },
      py::arg("qweight"), py::arg("qzeros"), py::arg("scales"), py::arg("g_idx") = py::none(),
      py::kw_only(), py::arg("bits") = 4, py::arg("group_size") = 128, py::arg("v2") = false,
      py::arg("out_features"), py::arg("in_features"), py::call_guard<py::gil_scoped_release>(),
      "The tensors of one linear of a GPTQ checkpoint to (parts, format, [out, in]), exactly.");
  m.def(
      "weight_from_awq",
      [](const at::Tensor& qweight, const at::Tensor& qzeros, const at::Tensor& scales,
         int64_t bits, int64_t group_size, int64_t out, int64_t in) {
        return flat(weight_from_awq(qweight, qzeros, scales, bits, group_size, out, in));
      },
      py::arg("qweight"), py::arg("qzeros"), py::arg("scales"), py::kw_only(), py::arg("bits") = 4,
      py::arg("group_size") = 128, py::arg("out_features"), py::arg("in_features"),
      py::call_guard<py::gil_scoped_release>(),
      "The tensors of one linear of an AWQ checkpoint to (parts, format, [out, in]), exactly.");
  m.def("packed_devices", &packed_devices,
        "Kinds of devices on which this build multiplies packed weights, 'cpu' first.");
}
