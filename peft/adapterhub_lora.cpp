#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/adapterhub.h>
#include <budwood/peft/convert/factors_file.h>
#include <budwood/peft/convert/lora_set.h>
#include <budwood/peft/fold.h>
#include <budwood/peft/io/text.h>
#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

/// LoRA in AdapterHub's folders: "P.loras.NAME.lora_A" [r, in] and ".lora_B" [out, r], one rank and
/// one alpha; GPT-2's c_attn has factors for each of q, k and v below one another.
namespace budwood {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

/// Where the library puts LoRA in a family of models.
struct Places {
  std::array<std::string, 3> qkv;  ///< ends of the paths of q, k and v
  std::string intermediate, output, joint;
};

Places places_of(const std::string& model_type) {
  static const std::map<std::string, Places> known = {
      // The library's names for these two are the reverse of BERT's.
      {"llama",
       {{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        "mlp.down_proj",
        "mlp.up_proj",
        ""}},
      {"mistral", {{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, "", "", ""}},
      {"bert",
       {{"attention.self.query", "attention.self.key", "attention.self.value"},
        "intermediate.dense",
        "output.dense",
        ""}},
      {"gpt2", {{"", "", ""}, "mlp.c_fc", "mlp.c_proj", "attn.c_attn"}},
  };
  const auto it = known.find(model_type);
  if (it == known.end())
    throw Error("convert", fmt::format("LoRA for AdapterHub is written for bert, gpt2, llama and "
                                       "mistral; the model is '{}'",
                                       model_type));
  return it->second;
}

bool is_hub(const fs::path& path) {
  return fs::is_directory(path) && is_adapterhub_folder(path);
}

struct Config {
  std::string name;
  double scaling = 1.0;
  bool dora = false;
  std::vector<std::string> matrices;  // of q, k, v
};

Config read_config(const fs::path& folder) {
  const auto path = (folder / "adapter_config.json").string();
  const auto json = io::parse_json(io::read_file(folder / "adapter_config.json", 64 << 20), path);
  const auto given = json.value("config", Json::object());
  const auto refuse = [&](const std::string& fact) { throw Error("convert", path + ": " + fact); };
  if (given.value("architecture", std::string()) != "lora")
    refuse("it is no LoRA; load the folder as an adapter instead");
  if (given.value("composition_mode", std::string("add")) != "add")
    refuse("composition_mode is not 'add': such an adapter (IA3) is no sum of factors");
  if (given.value("use_gating", false)) refuse("use_gating makes the change depend on the input");
  if (given.contains("vera_d") && !given["vera_d"].is_null()) refuse("vera_d: VeRA is not read");
  Config config{.name = json.value("name", std::string())};
  const double r = given.value("r", 8.0);
  double alpha = given.value("alpha", 8.0);
  const auto version = json.value("version", std::string());
  // Until 1.1 the library did not use alpha.
  if (version.starts_with("adapters.1.0") || version.starts_with("adapters.0") ||
      version.starts_with("0."))
    alpha = r;
  if (!(r >= 1)) refuse(fmt::format("r is {}", r));
  config.scaling = alpha / r;
  config.dora = given.value("use_dora", false);
  if (config.dora && alpha != r)
    refuse(
        fmt::format("alpha is {} and r {}: the library's DoRA takes norms of W + B A without "
                    "alpha, which is no DoRA elsewhere",
                    alpha, r));
  config.matrices = given.value("attn_matrices", std::vector<std::string>{"q", "v"});
  return config;
}

FloatArray finite_array(const at::Tensor& tensor) {
  if (!tensor.isfinite().all().item<bool>())
    throw Error("convert", "a factor holds NaN or infinity");
  return to_array(tensor);
}

// c_attn's parts as one pair: A on top of one another, B along a diagonal.
void join(LoraModule& module, const std::vector<std::string>& matrices) {
  const auto parts = static_cast<int64_t>(matrices.size());
  const int64_t r = module.b.shape[1], out = module.b.shape[0] / std::max<int64_t>(1, parts);
  if (parts < 1 || module.a.shape[0] != parts * r || module.b.shape[0] != parts * out)
    throw Error("convert",
                fmt::format("{}: factors {} and {} are not those of {} matrices", module.path,
                            io::shape_text(module.a.shape), io::shape_text(module.b.shape), parts));
  FloatArray b{{3 * out, parts * r}, std::vector<float>(static_cast<size_t>(3 * out * parts * r))};
  constexpr std::string_view order = "qkv";
  int64_t part = 0;
  for (int64_t place = 0; place < 3; ++place) {
    const std::string name(1, order[static_cast<size_t>(place)]);
    if (std::find(matrices.begin(), matrices.end(), name) == matrices.end()) continue;
    for (int64_t i = 0; i < out; ++i)
      std::copy_n(module.b.values.begin() + (part * out + i) * r, r,
                  b.values.begin() + (place * out + i) * parts * r + part * r);
    ++part;
  }
  module.b = std::move(b);
}

// The library multiplies a layer's bias by DoRA's factor too, which is another function than HF
// PEFT's.
void refuse_biases(const LoraSet& set, const ConvertBase& base) {
  for (const auto& module : set.modules)
    if (base.files().find(module.path + ".bias") != nullptr)
      throw Error("convert", module.path +
                                 ": AdapterHub's DoRA scales the bias of its layer along, "
                                 "and no other library's does");
}

LoraSet read_hub(const fs::path& path, const ConvertBase& base) {
  const auto config = read_config(path);
  NamedTensors tensors;
  std::shared_ptr<io::SafetensorsFile> file;
  if (fs::exists(path / "adapter.safetensors")) {
    file = std::make_shared<io::SafetensorsFile>(
        io::SafetensorsFile::open(path / "adapter.safetensors"));
    for (const auto& info : file->tensors()) tensors.emplace_back(info.name, as_tensor(info));
  } else {
    tensors = read_pickle(path / "pytorch_adapter.bin");
  }
  std::map<std::string, LoraModule> modules;
  for (const auto& [key, tensor] : tensors) {
    const auto middle = ".loras." + config.name + ".";
    const auto at = key.find(middle);
    const auto suffix = at == std::string::npos ? "" : key.substr(at + middle.size());
    if (suffix != "lora_A" && suffix != "lora_B" && suffix != "m.weight")
      throw Error("convert", fmt::format("{} holds {}, which is no factor of LoRA '{}'",
                                         path.string(), io::in_quotes(key), config.name));
    auto& module = modules[key.substr(0, at)];
    if (suffix == "lora_A") module.a = finite_array(tensor);
    if (suffix == "lora_B") module.b = finite_array(tensor);
    if (suffix == "m.weight") module.magnitude = finite_array(tensor.reshape({-1}));
  }
  LoraSet set;
  for (auto& [name, module] : modules) {
    module.path = name;
    if (!module.a.defined() || !module.b.defined() || module.a.shape.size() != 2 ||
        module.b.shape.size() != 2)
      throw Error("convert", fmt::format("{}: lora_A and lora_B do not make a pair", name));
    if (name.ends_with("attn.c_attn")) join(module, config.matrices);
    if (module.a.shape[0] != module.b.shape[1])
      throw Error("convert",
                  fmt::format("{}: factors {} and {} do not make a pair", name,
                              io::shape_text(module.a.shape), io::shape_text(module.b.shape)));
    module.scaling = config.scaling;
    set.modules.push_back(std::move(module));
  }
  if (config.dora && base.known()) refuse_biases(set, base);
  if (config.dora && !base.known())
    set.warnings.push_back(
        "AdapterHub's DoRA scales biases along: the result is right only on layers without one; "
        "with the model given that is looked up");
  return set;
}

/// What a set of modules is in the library's options.
struct Options {
  std::set<std::string> matrices, layers;
  bool selfattn = false, intermediate = false, output = false;
};

// The number of the block in "model.layers.3.mlp.up_proj".
std::string layer_of(const std::string& path) {
  size_t begin = 0;
  while (begin < path.size()) {
    const auto end = std::min(path.find('.', begin), path.size());
    const auto part = path.substr(begin, end - begin);
    if (!part.empty() && part.find_first_not_of("0123456789") == std::string::npos) return part;
    begin = end + 1;
  }
  return "";
}

bool ends_in(const std::string& path, const std::string& place) {
  return !place.empty() && path.ends_with("." + place);
}

Options options_of(const LoraSet& set, const Places& places) {
  Options options;
  std::vector<std::string> faults;
  std::map<std::string, std::set<std::string>> kinds;  // by layer
  for (const auto& module : set.modules) {
    const auto layer = layer_of(module.path);
    std::string kind;
    for (size_t i = 0; i < 3; ++i)
      if (ends_in(module.path, places.qkv[i])) kind = std::string(1, "qkv"[i]);
    if (ends_in(module.path, places.joint)) kind = "joint";
    if (ends_in(module.path, places.intermediate)) kind = "intermediate";
    // "attention.output.dense" ends like "output.dense".
    if (ends_in(module.path, places.output) && !module.path.ends_with("attention.output.dense"))
      kind = "output";
    if (kind.empty() || layer.empty())
      faults.push_back(module.path + ": the library has no LoRA at this place");
    kinds[layer].insert(kind);
    options.layers.insert(layer);
  }
  for (const auto& [layer, found] : kinds)
    if (found != kinds.begin()->second)
      faults.push_back(
          fmt::format("layer {} has LoRA at other places than layer {}, and the "
                      "library has one choice for all",
                      layer, kinds.begin()->first));
  if (!faults.empty())
    throw Error("convert", fmt::format("AdapterHub cannot hold this adapter:\n  {}",
                                       fmt::join(faults, "\n  ")));
  for (const auto& kind : kinds.begin()->second) {
    if (kind == "intermediate") {
      options.intermediate = true;
    } else if (kind == "output") {
      options.output = true;
    } else {
      options.selfattn = true;
      if (kind == "joint")
        options.matrices = {"q", "k", "v"};
      else
        options.matrices.insert(kind);
    }
  }
  return options;
}

void write_hub(const fs::path& out, LoraSet& set, const ConvertBase& base) {
  const auto model_type = base.model_type();
  const auto options = options_of(set, places_of(model_type));
  const int64_t rank = largest_rank(set.modules);
  const bool dora = any_magnitude(set.modules);
  if (dora) refuse_biases(set, base);
  // DoRA's norms there are those of W + B A: the scaling has to be in B.
  const auto common = dora ? std::nullopt : common_scaling(set.modules);
  const auto name = out.filename().empty() ? out.parent_path().filename() : out.filename();
  std::vector<std::pair<std::string, FloatArray>> arrays;
  for (const auto& module : set.modules) {
    if (dora && !module.magnitude.defined())
      throw Error("convert", module.path + " has no magnitude, and other modules have one");
    auto a = padded_a(module.a, rank);
    const auto b = padded_b(common ? module.b : scaled(module.b, module.scaling), rank);
    if (module.path.ends_with("attn.c_attn")) {
      if (dora) throw Error("convert", module.path + ": the library has no DoRA on GPT-2's c_attn");
      const auto once = a.values;
      for (int i = 0; i < 2; ++i) a.values.insert(a.values.end(), once.begin(), once.end());
      a.shape[0] *= 3;
    }
    const auto key = fmt::format("{}.loras.{}.", module.path, name.string());
    arrays.emplace_back(key + "lora_A", std::move(a));
    arrays.emplace_back(key + "lora_B", b);
    if (dora) {
      auto m = module.magnitude;
      m.shape.push_back(1);
      arrays.emplace_back(key + "m.weight", std::move(m));
    }
  }
  std::vector<int64_t> left_out;
  const auto layers = base.integer(model_type == "gpt2" ? "n_layer" : "num_hidden_layers");
  for (int64_t layer = 0; layer < layers; ++layer)
    if (!options.layers.contains(std::to_string(layer))) left_out.push_back(layer);
  std::vector<std::string> matrices;
  for (const char* one : {"q", "k", "v"})
    if (options.matrices.contains(one)) matrices.emplace_back(one);
  const auto text = Json::parse(base.files().config());
  const auto classes = text.value("architectures", std::vector<std::string>{""});
  const double alpha = common.value_or(1.0) * static_cast<double>(rank);
  Json lora = {{"architecture", "lora"},
               {"selfattn_lora", options.selfattn},
               {"intermediate_lora", options.intermediate},
               {"output_lora", options.output},
               {"attn_matrices", matrices},
               {"leave_out", left_out},
               {"r", rank},
               {"dropout", 0.0},
               {"composition_mode", "add"},
               {"init_weights", "lora"},
               {"init_weights_seed", nullptr},
               {"use_gating", false},
               {"use_dora", dora}};
  lora["alpha"] = std::floor(alpha) == alpha ? Json(static_cast<int64_t>(alpha)) : Json(alpha);
  const Json config = {
      {"config", lora},
      {"hidden_size", base.integer(model_type == "gpt2" ? "n_embd" : "hidden_size")},
      {"model_class", classes.empty() ? "" : classes[0]},
      {"model_name", set.base_model.value_or("")},
      {"model_type", model_type},
      {"name", name.string()},
      {"version", "adapters.1.3.0"}};
  io::AtomicFolder folder(out, io::Existing::replace);
  io::write_file(folder.path() / "adapter_config.json", config.dump(2));
  write_factors(folder.path() / "adapter.safetensors", arrays, {});
  folder.commit();
}

const bool registered = register_lora_format(
    "adapterhub", {.is = is_hub, .read = read_hub, .write = write_hub, .needs_model = true});

}  // namespace
}  // namespace budwood
