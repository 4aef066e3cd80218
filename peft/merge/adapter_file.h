#pragma once

#include <budwood/peft/config.h>
#include <budwood/peft/io/safetensors.h>
#include <budwood/peft/merge/fold_term.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace budwood {

/// A tensor of an adapter file in fp32. Throws for other than floats, and for NaN and infinity.
FloatArray float_array(const io::TensorInfo& tensor);

/// Writes what lies at `path`, an adapter of another library for `model`, as a folder of HF PEFT's
/// layout; false when it is not of a known kind.
using AdapterConverter =
    std::function<bool(const std::filesystem::path& path, const std::filesystem::path& model,
                       const std::filesystem::path& folder)>;
/// Sets how adapters of other libraries are read; called from a static object.
bool register_adapter_converter(AdapterConverter converter);
/// Whether a path is a folder of HF PEFT's layout.
bool is_peft_folder(const std::filesystem::path& path);

/// An adapter folder of HF PEFT's layout, sorted by what each tensor is for. Paths are relative to
/// the base model, as in the adapter: "model.layers.0.self_attn.q_proj".
class AdapterFile {
 public:
  /// Throws for a folder without weights, a method that is no change of weights and keys that do
  /// not begin as PEFT's do. With `model`, an adapter of another library is converted first.
  static AdapterFile open(const std::filesystem::path& folder,
                          const std::filesystem::path& model = {});

  const std::filesystem::path& folder() const { return folder_; }
  const AdapterConfig& config() const { return *config_; }
  const io::Metadata& metadata() const { return file_.metadata(); }
  /// Modules whose weight is changed by a formula, and whether it is a token table.
  const std::map<std::string, bool>& modules() const { return modules_; }
  FoldTerm term(const std::string& module) const;
  /// Tensors that take the place of the model's, by the model's name: whole modules, biases,
  /// tables.
  const std::map<std::string, const io::TensorInfo*>& whole() const { return whole_; }
  /// New rows of token tables, by the path of the table.
  const std::map<std::string, const io::TensorInfo*>& token_rows() const { return token_rows_; }
  /// Which rows of a table they are.
  std::vector<int64_t> token_ids(const std::string& table) const;

 private:
  explicit AdapterFile(io::SafetensorsFile file) : file_(std::move(file)) {}
  void sort_out(const io::TensorInfo& tensor, std::vector<std::string>& unknown);

  std::filesystem::path folder_;
  std::shared_ptr<const AdapterConfig> config_;
  const FoldMethod* method_ = nullptr;
  io::SafetensorsFile file_;
  std::map<std::string, bool> modules_;
  std::map<std::string, const io::TensorInfo*> whole_, token_rows_;
};

}  // namespace budwood
