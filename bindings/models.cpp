#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <budwood/peft/models/generate.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/tensor_file.h>

namespace py = pybind11;
using namespace budwood::models;

namespace {

py::object config_dict(const ModelConfig& config, at::ScalarType dtype) {
  return py::module_::import("json").attr("loads")(config.to_json(budwood::dtype_text(dtype)));
}

// A Python callback runs under the lock; a signal handler's exception ends the generation.
std::function<bool(int64_t)> token_callback(const py::object& callback) {
  return [callback](int64_t token) {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (callback.is_none()) return true;
    const auto answer = callback(token);
    return answer.is_none() || answer.cast<bool>();
  };
}

std::vector<int64_t> run_generate(CausalLM& model, const std::vector<int64_t>& ids,
                                  int64_t max_new_tokens, double temperature, int64_t top_k,
                                  double top_p, double repetition_penalty, uint64_t seed,
                                  std::vector<int64_t> eos_ids, const py::object& callback) {
  GenerateOptions options{max_new_tokens,
                          temperature,
                          top_k,
                          top_p,
                          repetition_penalty,
                          seed,
                          std::move(eos_ids),
                          token_callback(callback)};
  py::gil_scoped_release released;
  return generate(model, ids, options);
}

}  // namespace

void bind_models(py::module_& m) {
  py::class_<LossSum>(m, "LossSum", "Sum of token losses and the number of counted tokens.")
      .def_readonly("sum", &LossSum::sum)
      .def_readonly("count", &LossSum::count);

  py::class_<TokenBatch>(m, "TokenBatch", "Token sequences laid end to end, without padding.")
      .def(py::init([](at::Tensor ids, at::Tensor positions, std::vector<int64_t> cu_seqlens) {
             return TokenBatch{std::move(ids), std::move(positions), std::move(cu_seqlens)};
           }),
           py::arg("ids"), py::arg("positions"), py::arg("cu_seqlens"))
      .def_static("from_rows", py::overload_cast<const at::Tensor&>(&TokenBatch::from_rows))
      .def_static("from_rows",
                  py::overload_cast<const at::Tensor&, const at::Tensor&>(&TokenBatch::from_rows))
      .def_static("from_sequences", &TokenBatch::from_sequences)
      .def_readonly("ids", &TokenBatch::ids)
      .def_readonly("positions", &TokenBatch::positions)
      .def_readonly("cu_seqlens", &TokenBatch::cu_seqlens)
      .def_property_readonly("tokens", &TokenBatch::tokens);

  py::class_<CausalLM, std::shared_ptr<CausalLM>>(
      m, "CausalLM", "A causal language model in C++, built from slots; see load_model.")
      .def_property_readonly(
          "config",
          [](const CausalLM& model) { return config_dict(model.config(), model.dtype()); })
      .def_property_readonly(
          "dtype", [](const CausalLM& model) { return budwood::dtype_text(model.dtype()); })
      .def("forward", &CausalLM::forward, py::arg("ids"), py::call_guard<py::gil_scoped_release>(),
           "ids int64 [n, t] -> logits [n, t, vocabulary].")
      .def("__call__", &CausalLM::forward, py::arg("ids"), py::call_guard<py::gil_scoped_release>())
      .def(
          "hidden", [](CausalLM& model, const TokenBatch& batch) { return model.hidden(batch); },
          py::call_guard<py::gil_scoped_release>())
      .def("logits", &CausalLM::logits, py::call_guard<py::gil_scoped_release>())
      .def("loss", &CausalLM::loss, py::arg("batch"), py::arg("labels"),
           py::call_guard<py::gil_scoped_release>(),
           "Next-token cross-entropy over already shifted labels int64 [tokens], -100 = ignored.")
      .def(
          "train", [](CausalLM& model, bool on) { model.train(on); }, py::arg("mode") = true)
      .def("eval", [](CausalLM& model) { model.eval(); })
      .def("named_parameters", [](const CausalLM& model) {
        std::vector<std::pair<std::string, at::Tensor>> all;
        for (const auto& item : model.named_parameters())
          all.emplace_back(item.key(), item.value());
        return all;
      });

  m.def(
      "load_model",
      [](const std::string& path, const std::string& dtype, const std::string& weights,
         const std::string& quantize, std::vector<std::string> quantize_skip,
         const std::string& quantize_method) {
        return load(path, {dtype, weights, quantize, quantize_method, std::move(quantize_skip)});
      },
      py::arg("path"), py::arg("dtype") = "auto", py::arg("weights") = "dense",
      py::arg("quantize") = "", py::arg("quantize_skip") = LoadOptions{}.quantize_skip,
      py::arg("quantize_method") = LoadOptions{}.quantize_method,
      py::call_guard<py::gil_scoped_release>(),
      "A model from a Hugging Face folder or a GGUF file.\n\n"
      "dtype: 'auto' (what the file holds; float32 for a GGUF), 'float32', 'bfloat16', 'float16'.\n"
      "weights: 'dense' decodes a GGUF's blocks, 'packed' uses them as they lie in the file.\n"
      "quantize: 'nf4', 'fp4', 'int8', 'int4' or 'affine8' packs each matrix while loading, "
      "except\n"
      "those whose names contain one of quantize_skip. quantize_method: 'rtn', or 'hqq' for int4 "
      "and\n"
      "affine8.");
  m.def("read_config", [](const std::string& path) {
    return py::module_::import("json").attr("loads")(read_config(path).to_json("float32"));
  });
  m.def(
      "save_model",
      [](CausalLM& model, const std::string& folder, const std::string& dtype,
         const std::string& tokenizer_from, int64_t max_shard_size) {
        save(model, folder, {dtype, max_shard_size, tokenizer_from});
      },
      py::arg("model"), py::arg("folder"), py::arg("dtype") = "auto",
      py::arg("tokenizer_from") = "", py::arg("max_shard_size") = 5'000'000'000,
      py::call_guard<py::gil_scoped_release>(),
      "The model as a Hugging Face folder that transformers opens.");
  m.def("generate", &run_generate, py::arg("model"), py::arg("ids"),
        py::arg("max_new_tokens") = 128, py::arg("temperature") = 0.0, py::arg("top_k") = 0,
        py::arg("top_p") = 1.0, py::arg("repetition_penalty") = 1.0, py::arg("seed") = 0,
        py::arg("eos_ids") = std::vector<int64_t>{}, py::arg("callback") = py::none(),
        "Continues a prompt with a key/value cache; returns the new tokens.\n\n"
        "temperature 0 is greedy. callback(token) may return False to stop.");
}
