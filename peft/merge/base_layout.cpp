#include <budwood/peft/merge/base_layout.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>

namespace budwood {
namespace {

// What the classes of transformers with a head call their body.
constexpr std::array<std::string_view, 12> kBodies = {
    "model.",   "transformer.", "bert.", "roberta.", "deberta.",    "distilbert.",
    "electra.", "gpt_neox.",    "vit.",  "encoder.", "base_model.", "backbone."};
// The first of these hold the words that a tied head reads.
constexpr size_t kWordTables = 4;
constexpr std::array<std::string_view, 8> kTables = {
    "embed_tokens",          "wte",   "embed_in", "word_embeddings", "wpe", "position_embeddings",
    "token_type_embeddings", "shared"};

std::string last_of(const std::string& path) {
  const auto dot = path.rfind('.');
  return dot == std::string::npos ? path : path.substr(dot + 1);
}

bool is_one_of(std::string_view name, const std::string_view* begin, const std::string_view* end) {
  return std::find(begin, end, name) != end;
}

}  // namespace

BaseLayout::BaseLayout(const MergeBase& base) : base_(base) {
  if (base.config().empty()) return;
  const auto json = nlohmann::json::parse(base.config());
  if (json.contains("model_type") && json["model_type"].is_string())
    model_type_ = json["model_type"].get<std::string>();
  if (json.contains("architectures") && json["architectures"].is_array())
    for (const auto& name : json["architectures"]) {
      const auto text = name.is_string() ? name.get<std::string>() : "";
      causal_ |= text.ends_with("ForCausalLM") || text.ends_with("LMHeadModel");
    }
  if (!causal_ || base.find("lm_head.weight") || base.find("embed_out.weight")) return;
  for (const auto* tensor : base.tensors())
    if (is_word_table(tensor->name)) {
      tied_ = tensor;
      return;
    }
}

bool BaseLayout::is_word_table(const std::string& name) const {
  return name.ends_with(".weight") && is_one_of(last_of(name.substr(0, name.size() - 7)),
                                                kTables.data(), kTables.data() + kWordTables);
}

const io::TensorInfo* BaseLayout::find(const std::string& name) const {
  if (const auto* tensor = base_.find(name)) return tensor;
  for (const auto body : kBodies) {
    if (name.starts_with(body))
      if (const auto* tensor = base_.find(name.substr(body.size()))) return tensor;
    if (const auto* tensor = base_.find(std::string(body) + name)) return tensor;
  }
  return nullptr;
}

bool BaseLayout::stores_transposed(const std::string& module) const {
  static const std::set<std::string> families = {"gpt2", "imagegpt", "openai-gpt",
                                                 "decision_transformer"};
  static const std::set<std::string> layers = {"c_attn", "q_attn", "c_proj", "c_fc"};
  return families.contains(model_type_) && layers.contains(last_of(module));
}

std::vector<ModuleInfo> BaseLayout::modules() const {
  std::vector<ModuleInfo> modules;
  for (const auto* tensor : base_.tensors()) {
    if (tensor->shape.size() != 2 || !tensor->name.ends_with(".weight")) continue;
    ModuleInfo module{.path = tensor->name.substr(0, tensor->name.size() - 7)};
    const auto last = last_of(module.path);
    const bool table = is_one_of(last, kTables.data(), kTables.data() + kTables.size());
    module.kind = table                            ? ModuleKind::embedding
                  : stores_transposed(module.path) ? ModuleKind::conv1d
                                                   : ModuleKind::linear;
    module.is_output_embedding = last == "lm_head" || last == "embed_out";
    modules.push_back(std::move(module));
  }
  return modules;
}

}  // namespace budwood
