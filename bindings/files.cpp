#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <budwood/peft/inspect.h>
#include <budwood/peft/io/gguf_tokenizer.h>

namespace py = pybind11;

void bind_files(py::module_& m) {
  m.def(
      "write_tokenizer",
      [](const std::filesystem::path& gguf, const std::filesystem::path& folder) {
        budwood::io::write_tokenizer(budwood::io::GgufFile::open(gguf), folder);
      },
      py::arg("gguf"), py::arg("folder"),
      "Writes Hugging Face tokeniser files from the metadata of a GGUF file.");
  m.def(
      "inspect", [](const std::filesystem::path& path) { return budwood::inspect(path); },
      py::arg("path"),
      "What a file or folder is, as JSON text: an adapter, a safetensors or GGUF file, a model.");
}
