#include <budwood/peft/convert/lora_set.h>
#include <budwood/peft/io/gguf.h>
#include <budwood/peft/io/gguf_names.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>

/// llama.cpp's adapters: "<tensor>.lora_a" [r, in] and "<tensor>.lora_b" [out, r], scaled by
/// adapter.lora.alpha / r. Rows of B of q and k of architecture "llama" are permuted as the base's.
namespace budwood {
namespace {

namespace fs = std::filesystem;
constexpr const char* kAlpha = "adapter.lora.alpha";
constexpr size_t kLongestName = 63;

bool is_gguf(const fs::path& path) {
  if (fs::is_directory(path)) return false;
  char magic[4] = {};
  std::ifstream(path, std::ios::binary).read(magic, sizeof magic);
  return std::string_view(magic, sizeof magic) == "GGUF";
}

FloatArray decoded(const io::GgufTensor& tensor, const fs::path& path) {
  io::require_decodable(tensor.type, tensor.name, path.string());
  if (tensor.shape.size() != 2)
    throw Error("convert",
                fmt::format("'{}' has {} dimensions, wanted 2", tensor.name, tensor.shape.size()));
  FloatArray array{tensor.shape, {}};
  const int64_t rows = tensor.shape[0], cols = tensor.shape[1];
  array.values.resize(static_cast<size_t>(rows * cols));
  const int64_t width = quant::kernels::row_bytes(tensor.type, cols);
  for (int64_t r = 0; r < rows; ++r)
    quant::kernels::dequantize_row(tensor.type, tensor.data + r * width,
                                   array.values.data() + r * cols, cols);
  for (const float value : array.values)
    if (!std::isfinite(value))
      throw Error("convert", fmt::format("'{}' holds NaN or infinity", tensor.name));
  return array;
}

// Rows to the order of the file (`to`) or back.
FloatArray permuted(const FloatArray& b, int64_t head_dim, bool to) {
  const int64_t cols = b.shape[1];
  if (head_dim < 2 || b.shape[0] % head_dim != 0)
    throw Error("convert", fmt::format("{} rows are no whole heads of {}", b.shape[0], head_dim));
  FloatArray result = b;
  for (int64_t r = 0; r < b.shape[0]; ++r) {
    const int64_t other = io::row_in_gguf(r, head_dim);
    std::copy_n(b.values.begin() + (to ? r : other) * cols, cols,
                result.values.begin() + (to ? other : r) * cols);
  }
  return result;
}

LoraSet read_gguf(const fs::path& path, const ConvertBase& base) {
  const auto file = io::GgufFile::open(path);
  const auto type = file.get_string("general.type", "model");
  if (type != "adapter")
    throw Error("convert",
                fmt::format("{}: general.type is '{}', wanted 'adapter'", path.string(), type));
  if (const auto kind = file.get_string("adapter.type"); kind != "lora")
    throw Error("convert",
                fmt::format("{}: adapter.type is '{}', wanted 'lora'", path.string(), kind));
  const auto architecture = file.get_string("general.architecture");
  const double alpha = file.get_f32(kAlpha, 0.0f);
  std::map<std::string, LoraModule> modules;
  for (const auto& tensor : file.tensors()) {
    const auto end = tensor.name.rfind(".weight.lora_");
    const auto suffix = end == std::string::npos ? "" : tensor.name.substr(end + 8);
    const auto name = end == std::string::npos
                          ? std::nullopt
                          : io::name_from_gguf(tensor.name.substr(0, end) + ".weight");
    if (!name || (suffix != "lora_a" && suffix != "lora_b"))
      throw Error("convert", fmt::format("{} holds '{}', which is no factor of a known tensor",
                                         path.string(), tensor.name));
    const auto module = name->substr(0, name->size() - 7);
    auto& one = modules[module];
    one.path = module;
    one.table = module == "model.embed_tokens";
    auto array = decoded(tensor, path);
    if (suffix == "lora_a") {
      one.a = one.table ? transposed(array) : std::move(array);
    } else {
      one.b = architecture == "llama" && io::rotary_rows(*name)
                  ? permuted(array, base.head_dim(), false)
                  : std::move(array);
    }
  }
  LoraSet set{.task_type = "CAUSAL_LM"};
  for (auto& [name, module] : modules) {
    if (!module.a.defined() || !module.b.defined() || module.a.shape[0] != module.b.shape[1])
      throw Error("convert", fmt::format("{}: lora_a and lora_b do not make a pair", name));
    module.scaling = alpha == 0.0 ? 1.0 : alpha / static_cast<double>(module.rank());
    set.modules.push_back(std::move(module));
  }
  return set;
}

struct Factor {
  io::GgufTensorSpec spec;
  FloatArray array;
};

std::vector<Factor> factors_of(const LoraSet& set, const ConvertBase& base, float alpha) {
  std::vector<std::string> faults;
  std::vector<Factor> factors;
  const auto architecture = base.architecture();
  for (const auto& module : set.modules) {
    const auto weight = module.path + ".weight";
    if (module.magnitude.defined()) {
      faults.push_back(module.path + ": DoRA's magnitude has no place in the file");
      continue;
    }
    std::string name;
    try {
      name = io::gguf_name(weight);
    } catch (const Error&) {
      faults.push_back(module.path + " has no name in a GGUF file");
      continue;
    }
    if (module.path == "lm_head" && base.files().find("lm_head.weight") == nullptr)
      faults.push_back(
          "lm_head: the model's head is its token table, and llama.cpp takes no "
          "adapter for it alone");
    if (name.size() + 7 > kLongestName) faults.push_back(name + " is too long a name");
    const double own = module.scaling * static_cast<double>(module.rank());
    const double factor = static_cast<float>(own) == alpha ? 1.0 : own / alpha;
    auto b = factor == 1.0 ? module.b : scaled(module.b, factor);
    if (architecture == "llama" && io::rotary_rows(weight)) b = permuted(b, base.head_dim(), true);
    auto a = module.table ? transposed(module.a) : module.a;
    factors.push_back({{name + ".lora_a", io::GgmlType::f32, a.shape}, std::move(a)});
    factors.push_back({{name + ".lora_b", io::GgmlType::f32, b.shape}, std::move(b)});
  }
  if (!faults.empty())
    throw Error("convert",
                fmt::format("llama.cpp cannot hold this adapter; merge it instead:\n  {}",
                            fmt::join(faults, "\n  ")));
  return factors;
}

void write_gguf(const fs::path& out, LoraSet& set, const ConvertBase& base) {
  // llama.cpp divides alpha by each module's own rank.
  std::optional<float> alpha;
  for (const auto& module : set.modules) {
    const auto own = static_cast<float>(module.scaling * static_cast<double>(module.rank()));
    if (alpha && *alpha != own) {
      alpha.reset();
      break;
    }
    alpha = own;
  }
  const bool usable = alpha && *alpha != 0.0f;
  const float written = usable ? *alpha : static_cast<float>(largest_rank(set.modules));
  const auto factors = factors_of(set, base, written);
  std::vector<io::GgufTensorSpec> specs;
  for (const auto& factor : factors) specs.push_back(factor.spec);
  io::GgufWriter writer(out,
                        {{"general.architecture", base.architecture()},
                         {"general.type", std::string("adapter")},
                         {"adapter.type", std::string("lora")},
                         {kAlpha, written}},
                        specs);
  for (const auto& factor : factors)
    writer.write(factor.spec.name, factor.array.values.data(),
                 factor.array.values.size() * sizeof(float));
  writer.commit();
}

const bool registered = register_lora_format("gguf", {.is = is_gguf,
                                                      .read = read_gguf,
                                                      .write = write_gguf,
                                                      .single_file = true,
                                                      .needs_model = true});

}  // namespace
}  // namespace budwood
