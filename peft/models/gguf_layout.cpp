#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/gguf_layout.h>
#include <budwood/quant/error.h>
#include <array>
#include <string_view>
#include <utility>

namespace budwood::models {
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

at::Tensor swap_inside_heads(const at::Tensor& rows, int64_t heads, int64_t a, int64_t b) {
  return rows.reshape({heads, a, b, -1}).transpose(1, 2).reshape(rows.sizes());
}

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

at::Tensor rows_from_gguf(const at::Tensor& rows, int64_t head_dim) {
  return swap_inside_heads(rows, rows.size(0) / head_dim, head_dim / 2, 2);
}

at::Tensor rows_to_gguf(const at::Tensor& rows, int64_t head_dim) {
  return swap_inside_heads(rows, rows.size(0) / head_dim, 2, head_dim / 2);
}

bool rotary_rows(const std::string& name) {
  return name.find(".q_proj.") != std::string::npos || name.find(".k_proj.") != std::string::npos;
}

}  // namespace budwood::models
