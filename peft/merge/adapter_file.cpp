#include <budwood/peft/io/text.h>
#include <budwood/peft/merge/adapter_file.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/half.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>

namespace budwood {
namespace {

namespace fs = std::filesystem;
constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::string_view kRows = ".token_adapter.trainable_tokens_delta";
constexpr std::string_view kBase = ".base_layer.";

class FileModule final : public ModuleTensors {
 public:
  FileModule(const io::SafetensorsFile& file, std::string path)
      : file_(file), path_(std::move(path)) {}

  const std::string& path() const override { return path_; }

  FloatArray find(const std::string& suffix) const override {
    const auto* tensor = file_.find(fmt::format("{}{}.{}", kPrefix, path_, suffix));
    return tensor == nullptr ? FloatArray() : float_array(*tensor);
  }

  FloatArray at(const std::string& suffix, size_t dimensions) const override {
    auto found = find(suffix);
    if (!found.defined())
      throw Error("merge",
                  fmt::format("{} lacks {}{}.{}", file_.path().string(), kPrefix, path_, suffix));
    if (found.shape.size() != dimensions)
      throw Error("merge", fmt::format("{}{}.{} is {}, {} dimensions are wanted", kPrefix, path_,
                                       suffix, io::shape_text(found.shape), dimensions));
    return found;
  }

  FloatArray shared(const std::string& key) const override {
    const auto* tensor = file_.find(key);
    return tensor == nullptr ? FloatArray() : float_array(*tensor);
  }

 private:
  const io::SafetensorsFile& file_;
  std::string path_;
};

AdapterConverter& converter() {
  static AdapterConverter one;
  return one;
}

/// A folder that goes with it.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    auto name = (fs::temp_directory_path() / "budwood-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr)
      throw Error("merge",
                  "no temporary folder can be made in " + fs::temp_directory_path().string());
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

}  // namespace

bool register_adapter_converter(AdapterConverter one) {
  converter() = std::move(one);
  return true;
}

bool is_peft_folder(const fs::path& path) {
  const auto config = path / "adapter_config.json";
  return fs::is_directory(path) && fs::exists(path / "adapter_model.safetensors") &&
         fs::exists(config) &&
         config_kind(io::read_file(config), config.string()) == ConfigKind::peft;
}

FloatArray float_array(const io::TensorInfo& tensor) {
  FloatArray array{tensor.shape, {}};
  const auto count = static_cast<int64_t>(*io::element_count(tensor.shape));
  array.values.resize(static_cast<size_t>(count));
  float* to = array.values.data();
  using quant::kernels::FloatType;
  std::vector<uint16_t> halves;
  switch (tensor.dtype) {
    case io::Dtype::f32:
      std::memcpy(to, tensor.data, tensor.bytes());
      break;
    case io::Dtype::bf16:
    case io::Dtype::f16:
      halves.resize(static_cast<size_t>(count));
      std::memcpy(halves.data(), tensor.data, tensor.bytes());
      quant::kernels::to_fp32(tensor.dtype == io::Dtype::bf16 ? FloatType::bf16 : FloatType::fp16,
                              halves.data(), to, count);
      break;
    default:
      throw Error("merge", fmt::format("{} holds {}; F32, BF16 or F16 is wanted",
                                       io::in_quotes(tensor.name), io::dtype_name(tensor.dtype)));
  }
  if (!std::all_of(to, to + count, [](float x) { return std::isfinite(x); }))
    throw Error("merge", fmt::format("{} holds NaN or infinity", io::in_quotes(tensor.name)));
  return array;
}

std::shared_ptr<const AdapterConfig> read_config_of_files(const fs::path& folder,
                                                          std::vector<std::string>& parameters) {
  const auto path = folder / "adapter_config.json";
  auto json = io::parse_json(io::read_file(path), path.string());
  const char* key = "target_parameters";
  if (json.is_object() && json.contains(key) && json[key].is_array()) {
    for (const auto& name : json[key])
      if (name.is_string()) parameters.push_back(name.get<std::string>());
    json.erase(key);
  }
  return parse_adapter_config(json.dump(), Strictness::lenient, path.string());
}

AdapterFile AdapterFile::open(const fs::path& folder, const fs::path& model) {
  if (!model.empty() && !is_peft_folder(folder) && converter()) {
    const TemporaryFolder other;
    if (converter()(folder, model, other.path() / "adapter")) {
      auto adapter = open(other.path() / "adapter");
      adapter.folder_ = folder;
      return adapter;
    }
  }
  std::vector<std::string> parameters;
  const auto config = read_config_of_files(folder, parameters);
  const auto* method = find_fold(config->peft_type);
  if (method == nullptr)
    throw Error("merge", fmt::format("{} is {} and cannot be merged: what it does is no change of "
                                     "a weight",
                                     folder.string(), config->peft_type));
  AdapterFile adapter(io::SafetensorsFile::open(folder / "adapter_model.safetensors"));
  adapter.folder_ = folder;
  adapter.config_ = config;
  adapter.method_ = method;
  adapter.target_parameters_ = parameters;
  std::vector<std::string> unknown;
  for (const auto& tensor : adapter.file_.tensors()) adapter.sort_out(tensor, unknown);
  if (!unknown.empty())
    throw Error("merge", fmt::format("{} holds tensors that are not of HF PEFT's layout: {}",
                                     folder.string(), fmt::join(unknown, ", ")));
  if (!parameters.empty()) adapter.find_stacks();
  if (adapter.modules_.empty() && adapter.stacks_.empty() && adapter.whole_.empty() &&
      adapter.token_rows_.empty())
    throw Error("merge", fmt::format("{} holds no tensors", folder.string()));
  return adapter;
}

void AdapterFile::sort_out(const io::TensorInfo& tensor, std::vector<std::string>& unknown) {
  if (tensor.name.starts_with("budwood.") || tensor.name == "base_model.vera_A" ||
      tensor.name == "base_model.vera_B")
    return;
  if (!tensor.name.starts_with(kPrefix)) {
    unknown.push_back(tensor.name);
    return;
  }
  const auto name = tensor.name.substr(kPrefix.size());
  for (const auto& suffix : method_->suffixes) {
    if (!name.ends_with("." + suffix)) continue;
    const bool table = std::find(method_->table_suffixes.begin(), method_->table_suffixes.end(),
                                 suffix) != method_->table_suffixes.end();
    modules_[name.substr(0, name.size() - suffix.size() - 1)] |= table;
    return;
  }
  if (name.ends_with(kRows)) {
    token_rows_[name.substr(0, name.size() - kRows.size())] = &tensor;
    return;
  }
  auto plain = name;
  if (const auto at = plain.rfind(kBase); at != std::string::npos)
    plain.replace(at, kBase.size(), ".");
  whole_[plain] = &tensor;
}

// Modules of the file that are stacks: wrappers of parameters, one inside the other.
void AdapterFile::find_stacks() {
  constexpr std::string_view inner = ".base_layer";
  for (const auto& [path, table] : modules_) {
    auto module = path;
    while (module.ends_with(inner)) module.resize(module.size() - inner.size());
    const bool named = std::any_of(
        target_parameters_.begin(), target_parameters_.end(), [&](const std::string& parameter) {
          const auto dot = parameter.rfind('.');
          const auto owner = dot == std::string::npos ? "" : parameter.substr(0, dot);
          return owner.empty() || module == owner || module.ends_with("." + owner);
        });
    const auto* b = file_.find(fmt::format("{}{}.lora_B.weight", kPrefix, path));
    const auto* lora = dynamic_cast<const LoraConfig*>(config_.get());
    if (named && b && lora && b->shape.size() == 2 && b->shape[1] > lora->rank(module))
      stacks_[module].push_back(path);
  }
  for (auto& [module, paths] : stacks_) {
    for (const auto& path : paths) modules_.erase(path);
    std::sort(paths.begin(), paths.end(),
              [](const auto& a, const auto& b) { return a.size() > b.size(); });
  }
}

std::vector<std::string> AdapterFile::stack_paths() const {
  std::vector<std::string> all;
  for (const auto& [path, inside] : stacks_) all.push_back(path);
  return all;
}

std::vector<AdapterFile::Stack> AdapterFile::stacks(const std::string& path) const {
  std::vector<Stack> all;
  for (const auto& file_path : stacks_.at(path)) {
    const FileModule tensors(file_, file_path);
    all.push_back({file_path, tensors.at("lora_A.weight", 2), tensors.at("lora_B.weight", 2)});
  }
  return all;
}

FoldTerm AdapterFile::expert_term(const Stack& stack, const std::string& parameter, int64_t expert,
                                  int64_t first, int64_t rows) const {
  const auto& lora = static_cast<const LoraConfig&>(*config_);
  const int64_t rank = lora.rank(parameter), in = stack.a.shape[1];
  const int64_t experts = stack.a.shape[0] / rank;
  FoldTerm term{.scaling = lora.scaling(parameter)};
  const auto begin = stack.a.values.begin() + expert * rank * in;
  term.a = {{rank, in}, {begin, begin + rank * in}};
  term.b = {{rows, rank}, std::vector<float>(static_cast<size_t>(rows * rank))};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; k < rank; ++k)
      term.b.values[static_cast<size_t>(row * rank + k)] =
          stack.b.values[static_cast<size_t>(((first + row) * rank + k) * experts + expert)];
  return term;
}

FoldTerm AdapterFile::term(const std::string& module) const {
  return method_->term(*config_, FileModule(file_, module));
}

std::vector<int64_t> AdapterFile::token_ids(const std::string& table) const {
  const auto indices = config_->token_indices();
  if (const auto* ids = std::get_if<std::vector<int64_t>>(&indices)) return *ids;
  if (const auto* named = std::get_if<PatternMap<std::vector<int64_t>>>(&indices))
    for (const auto& [name, ids] : *named)
      if (table == name || table.ends_with("." + name)) return ids;
  throw Error("merge", fmt::format("{} holds new rows of {}, and its configuration does not say "
                                   "which",
                                   folder_.string(), table));
}

}  // namespace budwood
