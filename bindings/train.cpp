#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/ATen.h>
#include <budwood/peft/train/signals.h>
#include <budwood/peft/train/trainer.h>
#include <budwood/quant/error.h>

#include <optional>

namespace py = pybind11;
using namespace budwood::train;
using budwood::Error;
using budwood::models::CausalLM;

namespace {

py::object json_loads(const std::string& text) {
  return py::module_::import("json").attr("loads")(text);
}

// Lists, numpy arrays and tensors of whole numbers, as int64.
at::Tensor whole_numbers(const py::handle& values, const char* what) {
  const auto tensor =
      py::module_::import("torch").attr("as_tensor")(values).cast<at::Tensor>().cpu();
  if (tensor.dim() != 1)
    throw Error("TokenFileWriter", std::string(what) + " is a one-dimensional list of numbers");
  if (tensor.numel() > 0 && !at::isIntegralType(tensor.scalar_type(), /*includeBool=*/true))
    throw Error("TokenFileWriter", std::string(what) + " are whole numbers, found " +
                                       c10::toString(tensor.scalar_type()));
  return tensor.to(at::kLong).contiguous();
}

void add_row(TokenFileWriter& writer, const py::object& ids, const py::object& counted) {
  const auto row = whole_numbers(ids, "ids");
  std::vector<uint8_t> mask;
  if (!counted.is_none()) {
    const auto flags = whole_numbers(counted, "counted");
    for (int64_t i = 0; i < flags.numel(); ++i) {
      const auto flag = flags.const_data_ptr<int64_t>()[i];
      mask.push_back(flag == 0 || flag == 1 ? static_cast<uint8_t>(flag) : uint8_t{2});
    }
    if (mask.empty() && row.numel() > 0)
      throw Error("TokenFileWriter", "counted is empty; leave it out when every token counts");
  }
  writer.add({row.const_data_ptr<int64_t>(), static_cast<size_t>(row.numel())}, mask);
}

TrainOptions as_options(const py::object& value) {
  if (py::isinstance<TrainOptions>(value)) return value.cast<TrainOptions>();
  const auto text = py::isinstance<py::str>(value)
                        ? value.cast<std::string>()
                        : py::module_::import("json").attr("dumps")(value).cast<std::string>();
  return TrainOptions::from_json(text);
}

template <class... Fields>
py::dict make_dict(const Fields&... fields) {
  py::dict dict;
  ((dict[fields.first] = fields.second), ...);
  return dict;
}

template <class T>
std::pair<const char*, py::object> field(const char* name, const T& value) {
  return {name, py::cast(value)};
}

py::dict as_dict(const StepMetrics& m) {
  return make_dict(field("step", m.step), field("total_steps", m.total_steps),
                   field("epoch", m.epoch), field("loss", m.loss),
                   field("learning_rate", m.learning_rate), field("grad_norm", m.grad_norm),
                   field("tokens", m.tokens), field("tokens_per_second", m.tokens_per_second),
                   field("seconds", m.seconds), field("eta_seconds", m.eta_seconds),
                   field("peak_rss_mb", m.peak_rss_mb));
}

py::dict as_dict(const Evaluation& e) {
  return make_dict(field("loss", e.loss), field("loss_error", e.loss_error),
                   field("perplexity", e.perplexity), field("perplexity_error", e.perplexity_error),
                   field("tokens", e.tokens), field("sequences", e.sequences),
                   field("seconds", e.seconds));
}

py::dict as_dict(const SampleReport& r) {
  return make_dict(field("rows", r.rows), field("skipped_rows", r.skipped_rows),
                   field("truncated_rows", r.truncated_rows),
                   field("dropped_tokens", r.dropped_tokens), field("split_rows", r.split_rows),
                   field("windows", r.windows), field("sequences", r.sequences),
                   field("tokens", r.tokens), field("counted", r.counted),
                   field("longest", r.longest), field("summary", r.summary()));
}

py::object as_dict(const std::optional<BestLoss>& best) {
  if (!best) return py::none();
  return make_dict(field("step", best->step), field("loss", best->loss));
}

py::dict as_dict(const TrainResult& r) {
  return make_dict(
      field("steps", r.steps), field("interrupted", r.interrupted),
      field("final_loss", r.final_loss),
      std::pair("evaluation", r.evaluation ? py::object(as_dict(*r.evaluation)) : py::none()),
      std::pair("best", as_dict(r.best)), field("tokens", r.tokens), field("seconds", r.seconds),
      field("tokens_per_second", r.tokens_per_second), field("peak_rss_mb", r.peak_rss_mb),
      field("warnings", r.warnings));
}

// Python's own handler of SIGINT runs only in Python code, which a run does not reach: StopOnSignal
// takes its place, and the run ends with a checkpoint and interrupted = True.
py::dict run(Trainer& trainer, const py::object& on_log, const py::object& on_evaluation,
             bool handle_signals) {
  trainer.on_log = nullptr;
  trainer.on_evaluation = nullptr;
  if (!on_log.is_none())
    trainer.on_log = [&](const StepMetrics& metrics) {
      py::gil_scoped_acquire gil;
      on_log(as_dict(metrics));
    };
  if (!on_evaluation.is_none())
    trainer.on_evaluation = [&](int64_t step, const Evaluation& evaluation) {
      py::gil_scoped_acquire gil;
      on_evaluation(step, as_dict(evaluation));
    };
  TrainResult result;
  {
    py::gil_scoped_release released;
    std::optional<StopOnSignal> signals;
    if (handle_signals) signals.emplace();
    result = trainer.run();
  }
  return as_dict(result);
}

void bind_data(py::module_& m) {
  py::class_<Dataset, std::shared_ptr<Dataset>>(m, "Dataset", "Tokenised rows to train on.")
      .def_property_readonly("rows", &Dataset::rows)
      .def_property_readonly("tokens", &Dataset::tokens)
      .def_property_readonly("checksum", &Dataset::checksum)
      .def("check", &Dataset::check, py::arg("vocab_size"),
           "Raises Error with row, position and id when an id is not below vocab_size.")
      .def("__len__", &Dataset::rows);

  py::class_<TokenFile, Dataset, std::shared_ptr<TokenFile>>(
      m, "TokenFile", "A token file, mapped and checked in full (docs/formats.md).")
      .def_static("open", &TokenFile::open, py::arg("path"),
                  py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("counted", py::overload_cast<>(&TokenFile::counted, py::const_))
      .def_property_readonly("vocab_size", &TokenFile::vocab_size)
      .def_property_readonly("fingerprint", &TokenFile::fingerprint)
      .def_property_readonly("path", [](const TokenFile& file) { return file.path().string(); })
      .def(
          "row",
          [](const TokenFile& file, int64_t i) {
            auto row = file.row(i);
            return py::make_tuple(row.ids, row.counted);
          },
          py::arg("index"), "(ids int32 [n], counted bool [n])");

  py::class_<TokenFileWriter>(
      m, "TokenFileWriter",
      "Writes a token file row by row. It appears at commit(), or at the end of a with block that\n"
      "raises nothing.")
      .def(py::init<const std::filesystem::path&, int64_t, const std::string&>(), py::arg("path"),
           py::arg("vocab_size"), py::arg("fingerprint") = "")
      .def("add", &add_row, py::arg("ids"), py::arg("counted") = py::none(),
           "One row: token ids, and for each whether the loss counts on it (None: all).\n"
           "Lists, numpy arrays and tensors of whole numbers are taken.")
      .def_property_readonly("rows", &TokenFileWriter::rows)
      .def_property_readonly("tokens", &TokenFileWriter::tokens)
      .def_property_readonly("counted", &TokenFileWriter::counted)
      .def("commit", &TokenFileWriter::commit)
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](TokenFileWriter& writer, const py::object& type, const py::object&,
                          const py::object&) {
        if (type.is_none()) writer.commit();
      });
}

void bind_sampler(py::module_& m) {
  py::class_<Batch>(m, "Batch", "Sequences for one forward: tokens, labels, counted.")
      .def_readonly("tokens", &Batch::tokens)
      .def_readonly("labels", &Batch::labels)
      .def_readonly("counted", &Batch::counted);

  const SampleOptions defaults;
  py::class_<Sampler>(
      m, "Sampler",
      "Endless batches over a dataset. packing: 'concat' (plain text), 'pack' or\n"
      "'none'; long_rows: 'truncate' or 'split'. Equal arguments and positions give\n"
      "equal batches. Iterating gives the rest of the current epoch.")
      .def(py::init([](std::shared_ptr<Dataset> data, int64_t sequence_length, int64_t batch_size,
                       std::string packing, std::string long_rows, bool shuffle, uint64_t seed) {
             return Sampler(std::move(data), {sequence_length, batch_size, std::move(packing),
                                              std::move(long_rows), shuffle, seed});
           }),
           py::arg("data"), py::arg("sequence_length") = defaults.sequence_length,
           py::arg("batch_size") = defaults.batch_size, py::arg("packing") = defaults.packing,
           py::arg("long_rows") = defaults.long_rows, py::arg("shuffle") = defaults.shuffle,
           py::arg("seed") = defaults.seed)
      .def_property_readonly("report", [](const Sampler& s) { return as_dict(s.report()); })
      .def_property_readonly("batches", &Sampler::batches, "Batches of an epoch.")
      .def("next", &Sampler::next)
      .def(
          "state", [](const Sampler& s) { return std::pair(s.state().epoch, s.state().batch); },
          "(epoch, batches of it that were used)")
      .def("restore",
           [](Sampler& s, std::pair<int64_t, int64_t> state) {
             s.restore({state.first, state.second});
           })
      .def("__iter__", [](Sampler& s) {
        py::list rest;
        const auto epoch = s.state().epoch;
        while (s.state().epoch == epoch) rest.append(py::cast(s.next()));
        return py::iter(rest);
      });
}

}  // namespace

void bind_train(py::module_& m) {
  bind_data(m);
  bind_sampler(m);

  py::class_<TrainOptions>(m, "TrainOptions", "Options of a run, checked as a whole.")
      .def(py::init([](const py::kwargs& options) { return as_options(options); }))
      .def_static("from_json",
                  [](const std::string& text) { return TrainOptions::from_json(text); })
      .def_static("from_dict", [](const py::dict& options) { return as_options(options); })
      .def("to_json", &TrainOptions::to_json)
      .def("to_dict", [](const TrainOptions& options) { return json_loads(options.to_json()); })
      .def("__repr__", [](const TrainOptions& options) { return options.to_json(); });

  m.def(
      "schedule_multiplier",
      [](const std::string& name, int64_t step, int64_t total_steps, int64_t warmup_steps,
         double min_ratio) {
        const Schedule schedule{name, warmup_steps, total_steps, min_ratio};
        schedule.validate();
        return schedule.multiplier(step);
      },
      py::arg("name"), py::arg("step"), py::arg("total_steps"), py::arg("warmup_steps") = 0,
      py::arg("min_ratio") = 0.0, "The learning rate of a step as a part of the highest.");

  m.def(
      "evaluate",
      [](CausalLM& model, Sampler& sampler, int64_t batches) {
        Evaluation result;
        {
          py::gil_scoped_release released;
          result = evaluate(model, sampler, batches);
        }
        return as_dict(result);
      },
      py::arg("model"), py::arg("sampler"), py::arg("batches") = 0,
      "Mean loss, perplexity and their standard errors; dropout off, no gradients.");

  py::class_<Trainer>(m, "Trainer", "Trains what requires grad in a C++ model.")
      .def(py::init([](std::shared_ptr<CausalLM> model, std::shared_ptr<Dataset> train,
                       std::shared_ptr<Dataset> eval, const py::object& options) {
             auto checked = as_options(options);
             py::gil_scoped_release released;
             return std::make_unique<Trainer>(std::move(model), std::move(train), std::move(eval),
                                              std::move(checked));
           }),
           py::arg("model"), py::arg("train"), py::arg("eval") = nullptr,
           py::arg("options") = py::dict(), "options: TrainOptions, a dictionary or JSON.")
      .def("run", &run, py::arg("on_log") = py::none(), py::arg("on_evaluation") = py::none(),
           py::arg("handle_signals") = true,
           "Trains to the end and returns a dictionary.\n\n"
           "on_log(metrics) is called at logged steps, on_evaluation(step, evaluation) after an\n"
           "evaluation. With handle_signals, Ctrl-C and SIGTERM make it write a checkpoint and\n"
           "return with interrupted = True; a second one ends the process.")
      .def_property_readonly(
          "memory_plan",
          [](const Trainer& trainer) {
            const auto plan = trainer.memory_plan();
            py::dict d;
            d["process"] = plan.process;
            d["weights"] = plan.weights;
            d["mapped"] = plan.mapped;
            d["adapters"] = plan.adapters;
            d["gradients"] = plan.gradients;
            d["optimizer"] = plan.optimizer;
            d["activations"] = plan.activations;
            d["workspace"] = plan.workspace;
            d["total"] = plan.total();
            return d;
          },
          "Bytes that a run is expected to hold at its highest, by kind.")
      .def("evaluate",
           [](Trainer& trainer) {
             Evaluation result;
             {
               py::gil_scoped_release released;
               result = trainer.evaluate();
             }
             return as_dict(result);
           })
      .def("request_stop", &Trainer::request_stop)
      .def_property_readonly("options", &Trainer::options)
      .def_property_readonly("train_report",
                             [](const Trainer& t) { return as_dict(t.train_report()); })
      .def_property_readonly("eval_report",
                             [](const Trainer& t) -> py::object {
                               if (const auto* report = t.eval_report()) return as_dict(*report);
                               return py::none();
                             })
      .def_property_readonly("step", &Trainer::step)
      .def_property_readonly("total_steps", &Trainer::total_steps);
}
