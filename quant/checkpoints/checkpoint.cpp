#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/quant/checkpoints/checkpoint.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <budwood/quant/quantize.h>
#include <algorithm>
#include <nlohmann/json.hpp>

namespace budwood::quant {
namespace {

std::map<std::string, CheckpointFactory>& factories() {
  static std::map<std::string, CheckpointFactory> table;
  return table;
}

}  // namespace

bool register_checkpoint(const std::string& quant_method, CheckpointFactory factory) {
  return factories().emplace(quant_method, std::move(factory)).second;
}

std::unique_ptr<Checkpoint> open_checkpoint(const std::string& quantization_config) {
  std::vector<std::string> known;
  for (const auto& [name, factory] : factories()) known.push_back(name);
  std::string method;
  try {
    const auto json = nlohmann::json::parse(quantization_config);
    method = json.at("quant_method").get<std::string>();
  } catch (const nlohmann::json::exception&) {
    throw Error("load", fmt::format("quantization_config has no quant_method; known: {}",
                                    fmt::join(known, ", ")));
  }
  const auto it = factories().find(method);
  if (it == factories().end())
    throw Error("load", fmt::format("the folder is quantised with quant_method '{}', which is not "
                                    "supported; supported: {}",
                                    method, fmt::join(known, ", ")));
  return it->second(quantization_config);
}

at::Tensor required_part(const StoredParts& parts, const std::string& name) {
  const auto it = parts.find(name);
  if (it != parts.end()) return it->second;
  std::vector<std::string> names;
  for (const auto& [found, tensor] : parts) names.push_back(found);
  throw Error("load", fmt::format("'{}' is missing; found: {}", name, fmt::join(names, ", ")));
}

at::Tensor take_part(const StoredParts& parts, const std::string& name, at::ScalarType type,
                     int64_t count) {
  const auto part = required_part(parts, name);
  if (part.scalar_type() != type || part.numel() != count)
    throw Error("load",
                fmt::format("'{}' holds {} elements of {}, wanted {} of {}", name, part.numel(),
                            c10::toString(part.scalar_type()), count, c10::toString(type)));
  return part.contiguous();
}

void refuse_other_parts(const StoredParts& parts, const std::vector<std::string>& known) {
  for (const auto& [name, tensor] : parts)
    if (std::find(known.begin(), known.end(), name) == known.end())
      throw Error("load", fmt::format("'{}' does not belong to a packed layer; known: {}", name,
                                      fmt::join(known, ", ")));
}

namespace {

// Blocks of a GGUF file.
Weight made_of_blocks(const at::Tensor& w, const Weight& like) {
  const auto* type = kernels::ggml_type_traits(static_cast<uint32_t>(like.format) - 16);
  if (like.format < Format::gguf_q4_0 || type == nullptr || !type->writable)
    throw Error("quantize", fmt::format("{} weights are not made anew from numbers",
                                        form_of(like.format).name()));
  const auto values = w.to(at::kFloat).contiguous();
  auto made = like;
  made.parts = {at::empty_like(like.parts[0])};
  const int64_t width = kernels::row_bytes(type->type, like.in);
  auto* to = made.parts[0].mutable_data_ptr<uint8_t>();
  for (int64_t row = 0; row < like.out; ++row)
    if (!kernels::quantize_row(type->type, values.const_data_ptr<float>() + row * like.in,
                               to + row * width, like.in)
             .ok())
      throw Error("quantize",
                  fmt::format("row {} holds values that are not finite in {}", row, type->name));
  return made;
}

}  // namespace

Weight requantize(const at::Tensor& w, const Weight& like) {
  switch (like.format) {
    case Format::nf4:
    case Format::fp4:
      return quantize(w, {.format = like.format == Format::nf4 ? "nf4" : "fp4",
                          .block_size = like.parts[2].item<int64_t>(),
                          .double_quant = like.parts.size() == 6});
    case Format::int8_rows:
      return quantize(w, {.format = "int8"});
    case Format::affine4:
    case Format::affine8:
      return quantize(w, {.format = like.format == Format::affine4 ? "int4" : "affine8",
                          .block_size = like.parts[3].item<int64_t>()});
    default:
      return made_of_blocks(w, like);
  }
}

Weight with_moved_zeros(const Weight& w, const at::Tensor& change) {
  if (w.format != Format::affine4 && w.format != Format::affine8)
    throw Error("with_moved_zeros",
                fmt::format("{} weights have no zero points", form_of(w.format).name()));
  if (w.parts.size() > 4)
    throw Error("with_moved_zeros",
                "the groups of this weight are not made of neighbours (GPTQ's "
                "act-order), so a change that is constant in neighbours is not "
                "constant in them");
  const auto& scales = w.parts[1];
  if (change.sizes() != scales.sizes())
    throw Error("with_moved_zeros",
                fmt::format("a change of [{}] for scales of [{}]", fmt::join(change.sizes(), ", "),
                            fmt::join(scales.sizes(), ", ")));
  const auto wide = change.to(at::kDouble), size = scales.to(at::kDouble);
  if ((size == 0).logical_and(wide != 0).any().item<bool>())
    throw Error("with_moved_zeros", "a group with the scale 0 can hold no change");
  const auto moved = w.parts[2].to(at::kDouble) - at::where(size == 0, wide, wide / size);
  Weight result = w;
  result.parts[2] = moved.to(at::kFloat);
  return result;
}

}  // namespace budwood::quant
