#include <torch/csrc/utils/pybind.h>

#include <budwood/quant/error.h>
#include <budwood/quant/kernels/isa.h>
#include <budwood/quant/ops.h>
#include <budwood/version.h>

namespace py = pybind11;

void bind_config(py::module_& m);
void bind_targets(py::module_& m);
void bind_files(py::module_& m);
void bind_models(py::module_& m);
void bind_inject(py::module_& m);
void bind_mirror(py::module_& m);
void bind_merge(py::module_& m);
void bind_extract(py::module_& m);
void bind_combine(py::module_& m);
void bind_convert(py::module_& m);
void bind_train(py::module_& m);
void bind_optim(py::module_& m);
void bind_residual(py::module_& m);
void bind_ops(py::module_& m);
void bind_quant(py::module_& m);
void bind_calibrate(py::module_& m);

namespace {

// One class that callers of either habit catch: HF PEFT raises ValueError, LibTorch RuntimeError.
void bind_error(py::module_& m) {
  const auto bases = py::make_tuple(py::handle(PyExc_ValueError), py::handle(PyExc_RuntimeError));
  static py::object error = py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc(
      "budwood.Error",
      "Every failure Budwood reports: what refused, the value found and the value wanted.",
      bases.ptr(), nullptr));
  m.attr("Error") = error;
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const budwood::Error& e) {
      PyErr_SetString(error.ptr(), e.what());
    }
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  budwood::quant::link_operators();
  m.attr("__version__") = BUDWOOD_VERSION;
  m.attr("built_with_torch") = BUDWOOD_BUILT_WITH_TORCH;
  m.def(
      "instruction_set",
      [] { return budwood::quant::kernels::isa_name(budwood::quant::kernels::active_isa()); },
      "Which kernels are in use: 'scalar', 'avx2', 'avx512' or 'amx' (see BUDWOOD_ISA).");
  bind_error(m);
  bind_config(m);
  bind_targets(m);
  bind_files(m);
  bind_models(m);
  bind_mirror(m);
  bind_merge(m);
  bind_extract(m);
  bind_combine(m);
  bind_convert(m);
  bind_inject(m);
  bind_train(m);
  bind_optim(m);
  bind_residual(m);
  bind_ops(m);
  bind_quant(m);
  bind_calibrate(m);
}
