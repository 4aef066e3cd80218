#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <budwood/peft/base_weights.h>
#include <budwood/peft/models/bert.h>
#include <budwood/peft/models/generate.h>
#include <budwood/peft/models/quantize_files.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/models/save_gguf.h>
#include <budwood/peft/models/selected.h>
#include <budwood/peft/models/train_all.h>
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

py::dict quantize_report(const QuantizeFilesReport& report) {
  py::list matrices;
  for (const auto& m : report.matrices) {
    py::dict one;
    one["name"] = m.name;
    one["out"] = m.out;
    one["in"] = m.in;
    one["bytes"] = m.bytes;
    one["error"] = m.error;
    if (m.rtn_error >= 0) one["rtn_error"] = m.rtn_error;
    matrices.append(one);
  }
  py::dict result;
  result["matrices"] = matrices;
  result["weights"] = report.weights;
  result["bytes"] = report.bytes;
  result["error"] = report.error;
  result["warnings"] = report.warnings;
  return result;
}

py::dict report_dict(const SaveGgufReport& report) {
  py::list tensors;
  for (const auto& t : report.tensors)
    tensors.append(py::dict(py::arg("name") = t.name, py::arg("type") = t.type,
                            py::arg("shape") = t.shape, py::arg("bytes") = t.bytes,
                            py::arg("copied") = t.copied));
  return py::dict(py::arg("tensors") = tensors, py::arg("types") = report.types(),
                  py::arg("warnings") = report.warnings);
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
      .def_property("checkpointing", &CausalLM::checkpointing, &CausalLM::set_checkpointing,
                    "Every k-th block runs again in the backward instead of keeping what it "
                    "computed; 0 = none does.")
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

  py::class_<Bert, std::shared_ptr<Bert>>(m, "Bert", "A BERT encoder in C++; see load_bert.")
      .def("hidden", &Bert::hidden, py::arg("batch"), py::call_guard<py::gil_scoped_release>(),
           "Last hidden states [tokens, hidden].")
      .def("sentence_embedding", &Bert::sentence_embedding, py::arg("batch"),
           py::arg("normalize") = true, py::call_guard<py::gil_scoped_release>(),
           "Means of the last hidden states over each sequence [sequences, hidden].")
      .def("classify", &Bert::classify, py::arg("batch"), py::call_guard<py::gil_scoped_release>(),
           "Logits [sequences, labels].")
      .def("loss", &Bert::loss, py::arg("batch"), py::arg("labels"),
           py::call_guard<py::gil_scoped_release>())
      .def("set_checkpointing", &Bert::set_checkpointing, py::arg("every"))
      .def(
          "train", [](Bert& model, bool on) { model.train(on); }, py::arg("mode") = true)
      .def("eval", [](Bert& model) { model.eval(); })
      .def("named_parameters", [](const Bert& model) {
        std::vector<std::pair<std::string, at::Tensor>> all;
        for (const auto& item : model.named_parameters())
          all.emplace_back(item.key(), item.value());
        return all;
      });
  m.def(
      "load_bert",
      [](const std::string& folder, const std::string& dtype, const std::string& quantize,
         int64_t block_size, int64_t num_labels, uint64_t seed) {
        return load_bert(folder, {.dtype = dtype, .quantize = quantize, .block_size = block_size},
                         num_labels, seed);
      },
      py::arg("folder"), py::arg("dtype") = "auto", py::arg("quantize") = "",
      py::arg("block_size") = 64, py::arg("num_labels") = 0, py::arg("seed") = 0,
      py::call_guard<py::gil_scoped_release>(),
      "A BERT encoder from a Hugging Face folder; num_labels makes a classifier where there is "
      "none.");

  m.def(
      "load_model",
      [](const std::string& path, const std::string& dtype, const std::string& weights,
         const std::string& quantize, int64_t block_size, bool double_quant,
         std::vector<std::string> quantize_skip, const std::string& quantize_method) {
        return load(path, {dtype, weights, quantize, quantize_method, block_size, double_quant,
                           std::move(quantize_skip)});
      },
      py::arg("path"), py::arg("dtype") = "auto", py::arg("weights") = "auto",
      py::arg("quantize") = "", py::arg("block_size") = 64, py::arg("double_quant") = false,
      py::arg("quantize_skip") = LoadOptions{}.quantize_skip,
      py::arg("quantize_method") = LoadOptions{}.quantize_method,
      py::call_guard<py::gil_scoped_release>(),
      "A model from a Hugging Face folder or a GGUF file.\n\n"
      "dtype: 'auto' (what the file holds; float32 for a GGUF), 'float32', 'bfloat16', 'float16'.\n"
      "weights: 'packed' uses a GGUF's blocks, or a folder's 16-bit matrices in a float32 model, "
      "as\n"
      "they lie in the file; 'dense' decodes them; 'auto' is packed for a GGUF without quantize.\n"
      "quantize: 'nf4', 'fp4', 'int8', 'int4' or 'affine8' packs each matrix while loading, "
      "except\n"
      "those whose names contain one of quantize_skip; block_size elements share a scale.\n"
      "quantize_method: 'rtn', or 'hqq' for int4 and affine8.\n"
      "A folder that is quantised already keeps its codes.");
  m.def(
      "base_fingerprint",
      [](const std::vector<
          std::tuple<std::string, std::vector<at::Tensor>, int64_t, int64_t, int64_t>>& weights) {
        budwood::BaseFingerprint base;
        for (const auto& [path, parts, format, out, in] : weights)
          base.weights.push_back(budwood::sample_weight(
              path, budwood::quant::Weight::from_parts(parts, format, out, in)));
        return base.to_json();
      },
      py::arg("weights"),
      "What an adapter remembers of (path, parts, format, out, in) of the weights it changes.");
  m.def(
      "base_weights",
      [](CausalLM& model) {
        py::list all;
        for (const auto& part : budwood::base_weights(model)) {
          py::dict one;
          one["form"] = part.form;
          one["matrices"] = part.matrices;
          one["weights"] = part.weights;
          one["bytes"] = part.bytes;
          all.append(one);
        }
        return all;
      },
      "The frozen matrices of a model by the form in which they are stored.");
  m.def(
      "quantize_files",
      [](const std::string& model, const std::string& out, const std::string& format,
         const std::string& method, int64_t block_size, bool double_quant, bool act_order,
         bool static_groups, std::optional<std::vector<std::string>> skip, const std::string& dtype,
         const std::string& calibration, int64_t calibration_tokens, int64_t sequence_length,
         int64_t max_shard_size, bool overwrite, const py::object& progress) {
        QuantizeFilesOptions options{.model = model,
                                     .out = out,
                                     .format = format,
                                     .method = method,
                                     .block_size = block_size,
                                     .double_quant = double_quant,
                                     .act_order = act_order,
                                     .static_groups = static_groups,
                                     .dtype = dtype,
                                     .calibration = calibration,
                                     .calibration_tokens = calibration_tokens,
                                     .sequence_length = sequence_length,
                                     .max_shard_size = max_shard_size,
                                     .overwrite = overwrite,
                                     .progress = {}};
        if (skip) options.skip = *skip;
        options.progress = [&progress](const std::string& name) {
          py::gil_scoped_acquire gil;
          if (PyErr_CheckSignals() != 0) throw py::error_already_set();
          if (!progress.is_none()) progress(name);
        };
        QuantizeFilesReport report;
        {
          py::gil_scoped_release released;
          report = quantize_files(options);
        }
        return quantize_report(report);
      },
      py::arg("model"), py::arg("out"), py::arg("format") = "nf4", py::arg("method") = "rtn",
      py::arg("block_size") = 64, py::arg("double_quant") = false, py::arg("act_order") = true,
      py::arg("static_groups") = true, py::arg("skip") = py::none(), py::arg("dtype") = "auto",
      py::arg("calibration") = "", py::arg("calibration_tokens") = 8192,
      py::arg("sequence_length") = 512, py::arg("max_shard_size") = 5'000'000'000,
      py::arg("overwrite") = false, py::arg("progress") = py::none(),
      "Quantises a model on disk; what the command line's quantize does. Returns its figures.");
  m.def("read_config", [](const std::string& path) {
    return py::module_::import("json").attr("loads")(read_config(path).to_json("float32"));
  });
  m.def("selected_loss", &budwood::models::selected_loss, py::arg("model"), py::arg("batch"),
        py::arg("labels"), py::arg("rows"), py::call_guard<py::gil_scoped_release>(),
        "The loss of some tokens, with gradients through them alone (TokenTune); see selected.h.");
  m.def("select_tokens", &budwood::models::select_tokens, py::arg("batch"), py::arg("labels"),
        py::arg("amount"), py::arg("seed") = 0, py::arg("step") = 0, py::arg("part") = 0);
  m.def("train_all", &budwood::models::train_all, py::arg("model"),
        "Makes every parameter of a plain model trainable.");
  m.def(
      "save_model",
      [](CausalLM& model, const std::string& folder, const std::string& dtype,
         const std::string& tokenizer_from, int64_t max_shard_size, const std::string& weights,
         bool overwrite) {
        save(model, folder, {dtype, weights, max_shard_size, overwrite, tokenizer_from});
      },
      py::arg("model"), py::arg("folder"), py::arg("dtype") = "auto",
      py::arg("tokenizer_from") = "", py::arg("max_shard_size") = 5'000'000'000,
      py::arg("weights") = "dense", py::arg("overwrite") = false,
      py::call_guard<py::gil_scoped_release>(),
      "The model as a Hugging Face folder that transformers opens.\n\n"
      "weights: 'dense' decodes packed weights, 'packed' saves them as they are.");
  m.def(
      "save_gguf",
      [](CausalLM& model, const std::string& path, const std::string& type,
         const std::string& embedding_type, const std::string& tokenizer_from,
         const std::string& name) {
        SaveGgufReport report;
        {
          py::gil_scoped_release released;
          report = save_gguf(model, path, {type, embedding_type, tokenizer_from, name});
        }
        return report_dict(report);
      },
      py::arg("model"), py::arg("path"), py::arg("type") = SaveGgufOptions{}.type,
      py::arg("embedding_type") = "", py::arg("tokenizer_from") = "", py::arg("name") = "",
      "The model as a GGUF file that llama.cpp runs.\n\n"
      "type: 'f32', 'f16', 'bf16', 'q8_0', 'q4_1' or 'q4_0', of all matrices but the token table\n"
      "and the head, which have embedding_type (default: q8_0 beside 4-bit types, else type).\n"
      "tokenizer_from: a Hugging Face folder or GGUF file; empty writes no tokeniser.\n"
      "Returns {'tensors': [{name, type, shape, bytes, copied}], 'types': {type: count},\n"
      "'warnings': [text]}.");
  m.def("generate", &run_generate, py::arg("model"), py::arg("ids"),
        py::arg("max_new_tokens") = 128, py::arg("temperature") = 0.0, py::arg("top_k") = 0,
        py::arg("top_p") = 1.0, py::arg("repetition_penalty") = 1.0, py::arg("seed") = 0,
        py::arg("eos_ids") = std::vector<int64_t>{}, py::arg("callback") = py::none(),
        "Continues a prompt with a key/value cache; returns the new tokens.\n\n"
        "temperature 0 is greedy. callback(token) may return False to stop.");
}
