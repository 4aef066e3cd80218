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

/// The configuration of an adapter folder; target_parameters, which no slot takes and the files of
/// a model do, are taken out of it.
std::shared_ptr<const AdapterConfig> read_config_of_files(const std::filesystem::path& folder,
                                                          std::vector<std::string>& parameters);

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
  /// HF PEFT's target_parameters: stacks of matrices, one for each expert, that are no modules.
  const std::vector<std::string>& target_parameters() const { return target_parameters_; }
  /// Factors of such a stack, by the path in the file; both have a rank for each expert.
  struct Stack {
    std::string file_path;  ///< "model.layers.0.mlp.experts.base_layer"
    FloatArray a;           ///< [experts r, in]: expert by expert
    FloatArray b;           ///< [out, r experts]: rank by rank
  };
  /// Those below the module of that path, the innermost first.
  std::vector<Stack> stacks(const std::string& path) const;
  /// Paths that have some.
  std::vector<std::string> stack_paths() const;
  /// What of a stack changes one expert's rows [first, first + rows) of out.
  FoldTerm expert_term(const Stack& stack, const std::string& parameter, int64_t expert,
                       int64_t first, int64_t rows) const;
  /// Tensors that take the place of the model's, by the model's name: whole modules, biases,
  /// tables.
  const std::map<std::string, const io::TensorInfo*>& whole() const { return whole_; }
  /// New rows of token tables, by the path of the table.
  const std::map<std::string, const io::TensorInfo*>& token_rows() const { return token_rows_; }
  /// Which rows of a table they are.
  std::vector<int64_t> token_ids(const std::string& table) const;

 private:
  explicit AdapterFile(io::SafetensorsFile file) : file_(std::move(file)) {}
  void find_stacks();
  void sort_out(const io::TensorInfo& tensor, std::vector<std::string>& unknown);

  std::filesystem::path folder_;
  std::shared_ptr<const AdapterConfig> config_;
  const FoldMethod* method_ = nullptr;
  io::SafetensorsFile file_;
  std::map<std::string, bool> modules_;
  std::vector<std::string> target_parameters_;
  std::map<std::string, std::vector<std::string>> stacks_;  // paths in the file, by module
  std::map<std::string, const io::TensorInfo*> whole_, token_rows_;
};

}  // namespace budwood
