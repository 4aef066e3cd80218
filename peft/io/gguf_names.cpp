#include <budwood/peft/io/gguf_names.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <array>
#include <limits>
#include <string_view>
#include <utility>

namespace budwood::io {
namespace {

using Pair = std::pair<std::string_view, std::string_view>;

constexpr std::array<Pair, 3> kTop = {
    {{"model.embed_tokens", "token_embd"}, {"model.norm", "output_norm"}, {"lm_head", "output"}}};

constexpr std::array<Pair, 11> kBlock = {{{"input_layernorm", "attn_norm"},
                                          {"self_attn.q_proj", "attn_q"},
                                          {"self_attn.k_proj", "attn_k"},
                                          {"self_attn.v_proj", "attn_v"},
                                          {"self_attn.o_proj", "attn_output"},
                                          {"self_attn.q_norm", "attn_q_norm"},
                                          {"self_attn.k_norm", "attn_k_norm"},
                                          {"post_attention_layernorm", "ffn_norm"},
                                          {"mlp.gate_proj", "ffn_gate"},
                                          {"mlp.up_proj", "ffn_up"},
                                          {"mlp.down_proj", "ffn_down"}}};

}  // namespace

std::string gguf_name(const std::string& name) {
  const auto dot = name.rfind('.');
  const std::string_view module = std::string_view(name).substr(0, dot);
  const std::string suffix = dot == std::string::npos ? "" : name.substr(dot);
  for (const auto& [own, theirs] : kTop)
    if (module == own) return std::string(theirs) + suffix;
  constexpr std::string_view layers = "model.layers.";
  if (module.starts_with(layers)) {
    const auto rest = module.substr(layers.size());
    const auto next = rest.find('.');
    if (next != std::string_view::npos)
      for (const auto& [own, theirs] : kBlock)
        if (rest.substr(next + 1) == own)
          return fmt::format("blk.{}.{}{}", rest.substr(0, next), theirs, suffix);
  }
  throw Error("gguf", fmt::format("the tensor '{}' has no name in a GGUF file", name));
}

std::optional<std::string> name_from_gguf(const std::string& name) {
  const auto dot = name.rfind('.');
  if (dot == std::string::npos) return {};
  const std::string_view module = std::string_view(name).substr(0, dot);
  const std::string suffix = name.substr(dot);
  for (const auto& [own, theirs] : kTop)
    if (module == theirs) return std::string(own) + suffix;
  if (!module.starts_with("blk.")) return {};
  const auto rest = module.substr(4);
  const auto next = rest.find('.');
  if (next == std::string_view::npos) return {};
  for (const auto& [own, theirs] : kBlock)
    if (rest.substr(next + 1) == theirs)
      return fmt::format("model.layers.{}.{}{}", rest.substr(0, next), own, suffix);
  return {};
}

int64_t gguf_place(const std::string& name) {
  if (name.starts_with("token_embd")) return -2;
  if (name == kRopeDivisors) return -1;
  if (name.starts_with("blk.")) return std::stoll(name.substr(4));
  return std::numeric_limits<int64_t>::max();
}

bool rotary_rows(const std::string& name) {
  return name.find(".q_proj.") != std::string::npos || name.find(".k_proj.") != std::string::npos;
}

}  // namespace budwood::io
