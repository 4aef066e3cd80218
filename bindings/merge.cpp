#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <budwood/peft/merge.h>
#include <budwood/peft/models/compare_logits.h>

namespace py = pybind11;
using namespace budwood;

namespace {

using Adapters = std::vector<std::pair<std::filesystem::path, double>>;

MergeFilesOptions options_of(const std::filesystem::path& model, const Adapters& adapters,
                             const std::filesystem::path& out) {
  MergeFilesOptions options;
  options.model = model;
  options.out = out;
  for (const auto& [path, weight] : adapters) options.adapters.push_back({path, weight});
  return options;
}

}  // namespace

void bind_merge(py::module_& m) {
  py::class_<MergedTensor>(m, "MergedTensor", "What a merge made of one weight.")
      .def_readonly("name", &MergedTensor::name)
      .def_readonly("weight_norm", &MergedTensor::weight_norm)
      .def_readonly("delta_norm", &MergedTensor::delta_norm)
      .def_readonly("survival", &MergedTensor::survival)
      .def_readonly("error", &MergedTensor::error)
      .def_readonly("distance", &MergedTensor::distance);
  py::class_<MergeFilesReport>(m, "MergeFilesReport", "What merge_files did.")
      .def_readonly("merged", &MergeFilesReport::merged)
      .def_readonly("replaced", &MergeFilesReport::replaced)
      .def_readonly("warnings", &MergeFilesReport::warnings)
      .def_readonly("files", &MergeFilesReport::files)
      .def_readonly("bytes", &MergeFilesReport::bytes);
  m.def(
      "merge_files",
      [](const std::filesystem::path& model, const Adapters& adapters,
         const std::filesystem::path& out, const std::string& into,
         const std::filesystem::path& original, const std::string& dtype, uint64_t max_shard_size,
         int jobs, bool overwrite, bool force, bool resume, bool backup) {
        auto options = options_of(model, adapters, out);
        options.into = into;
        options.original = original;
        options.dtype = dtype;
        options.max_shard_size = max_shard_size;
        options.jobs = jobs;
        options.overwrite = overwrite;
        options.force = force;
        options.resume = resume;
        options.backup = backup;
        return merge_files(options);
      },
      py::arg("model"), py::arg("adapters"), py::arg("out"), py::kw_only(),
      py::arg("into") = "dequantised", py::arg("original") = "", py::arg("dtype") = "auto",
      py::arg("max_shard_size") = 5'000'000'000, py::arg("jobs") = 0, py::arg("overwrite") = false,
      py::arg("force") = false, py::arg("resume") = false, py::arg("backup") = false,
      py::call_guard<py::gil_scoped_release>(),
      "Folds (adapter folder, weight) pairs into the files of a model, piece by piece.");
  py::class_<VerifiedTensor>(m, "VerifiedTensor",
                             "How a merged tensor stands to what it should be.")
      .def_readonly("name", &VerifiedTensor::name)
      .def_readonly("equal", &VerifiedTensor::equal)
      .def_readonly("delta_norm", &VerifiedTensor::delta_norm)
      .def_readonly("survival", &VerifiedTensor::survival)
      .def_readonly("error", &VerifiedTensor::error)
      .def_readonly("steps", &VerifiedTensor::steps);
  py::class_<VerifyFilesReport>(m, "VerifyFilesReport", "What verify_files found.")
      .def_readonly("tensors", &VerifyFilesReport::tensors)
      .def_readonly("faults", &VerifyFilesReport::faults)
      .def("passed", &VerifyFilesReport::passed, py::arg("steps"))
      .def("to_json", &VerifyFilesReport::to_json, py::arg("steps"));
  m.def(
      "verify_files",
      [](const std::filesystem::path& model, const Adapters& adapters,
         const std::filesystem::path& merged) {
        return verify_files(options_of(model, adapters, merged));
      },
      py::arg("model"), py::arg("adapters"), py::arg("merged"),
      py::call_guard<py::gil_scoped_release>(),
      "Compares a merged model with what the model and the adapters make.");
  using models::LogitsComparison;
  py::class_<LogitsComparison>(m, "LogitsComparison", "Logits of two models for one text.")
      .def_readonly("tokens", &LogitsComparison::tokens)
      .def_readonly("difference", &LogitsComparison::difference)
      .def_readonly("size", &LogitsComparison::size)
      .def_readonly("agreement", &LogitsComparison::agreement)
      .def_property_readonly("relative", &LogitsComparison::relative);
  m.def(
      "compare_logits",
      [](const std::string& model, const Adapters& adapters, const std::string& merged,
         std::vector<int64_t> ids, int64_t count) {
        return models::compare_logits(model, options_of(model, adapters, merged).adapters, merged,
                                      std::move(ids), count);
      },
      py::arg("model"), py::arg("adapters"), py::arg("merged"),
      py::arg("ids") = std::vector<int64_t>{}, py::arg("count") = 16,
      py::call_guard<py::gil_scoped_release>(),
      "Logits of a model with (adapter folder, weight) pairs beside those of the merged one.");
  py::class_<UnmergeFilesReport>(m, "UnmergeFilesReport", "What unmerge_files did.")
      .def_readonly("source", &UnmergeFilesReport::from)
      .def_readonly("restored", &UnmergeFilesReport::restored)
      .def_readonly("warnings", &UnmergeFilesReport::warnings)
      .def_readonly("error", &UnmergeFilesReport::error);
  m.def(
      "unmerge_files",
      [](const std::filesystem::path& model, const Adapters& adapters,
         const std::filesystem::path& base, const std::filesystem::path& out,
         uint64_t max_shard_size, int jobs, bool overwrite) {
        UnmergeFilesOptions options{.model = model, .base = base, .out = out};
        for (const auto& [path, weight] : adapters) options.adapters.push_back({path, weight});
        options.max_shard_size = max_shard_size;
        options.jobs = jobs;
        options.overwrite = overwrite;
        return unmerge_files(options);
      },
      py::arg("model"), py::arg("adapters"), py::arg("base"), py::arg("out"),
      py::arg("max_shard_size") = 5'000'000'000, py::arg("jobs") = 0, py::arg("overwrite") = false,
      py::call_guard<py::gil_scoped_release>(), "Writes a model as it was before a merge.");
  m.def(
      "why_not_streamed",
      [](const std::filesystem::path& model, const Adapters& adapters) {
        return why_not_streamed(options_of(model, adapters, ""));
      },
      py::arg("model"), py::arg("adapters"),
      "Why these cannot be merged piece by piece; None when they can.");
}
