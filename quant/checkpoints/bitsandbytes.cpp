#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/quant/checkpoints/bitsandbytes.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/bnb4.h>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

namespace budwood::quant {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kNestedBlock = 256;
// Larger is no settings but an attack on the parser.
constexpr int64_t kLongestState = 4096;
const std::string kState = "weight.quant_state.bitsandbytes__";

struct State {
  std::string quant_type;
  int64_t block_size = 0;
  std::vector<int64_t> shape;
  bool nested = false;
  double offset = 0;
};

const char* dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    default:
      throw Error("save", fmt::format("bitsandbytes dequantises to float32, bfloat16 or float16, "
                                      "found {}",
                                      c10::toString(dtype)));
  }
}

std::string state_name(const StoredParts& parts) {
  std::string name;
  for (const auto& [part, tensor] : parts) {
    if (!part.starts_with("weight.quant_state.")) continue;
    if (!name.empty()) throw Error("load", fmt::format("two settings, '{}' and '{}'", name, part));
    name = part;
  }
  if (name.empty())
    throw Error("load", fmt::format("the settings '{}nf4' (or fp4) are missing", kState));
  if (name != kState + "nf4" && name != kState + "fp4")
    throw Error("load", fmt::format("'{}' is of an unknown type; known: nf4, fp4", name));
  return name;
}

State read_state(const StoredParts& parts, const std::string& name) {
  const auto& bytes = parts.at(name);
  if (bytes.scalar_type() != at::kByte || bytes.numel() < 2 || bytes.numel() > kLongestState)
    throw Error("load",
                fmt::format("'{}' holds {} elements of {}, wanted at most {} bytes of JSON", name,
                            bytes.numel(), c10::toString(bytes.scalar_type()), kLongestState));
  const auto flat = bytes.contiguous();
  const auto* text = reinterpret_cast<const char*>(flat.const_data_ptr<uint8_t>());
  State state;
  try {
    const auto json = Json::parse(text, text + flat.numel());
    state.quant_type = json.at("quant_type").get<std::string>();
    state.block_size = json.at("blocksize").get<int64_t>();
    state.shape = json.at("shape").get<std::vector<int64_t>>();
    state.nested = json.contains("nested_blocksize");
    if (state.nested) {
      state.offset = json.at("nested_offset").get<double>();
      const auto block = json.at("nested_blocksize").get<int64_t>();
      if (block != kNestedBlock)
        throw Error("load", fmt::format("'{}': nested_blocksize is {}, wanted {}", name, block,
                                        kNestedBlock));
    }
  } catch (const nlohmann::json::exception& e) {
    throw Error("load", fmt::format("'{}': {}", name, e.what()));
  }
  if (!name.ends_with(state.quant_type))
    throw Error("load", fmt::format("'{}' says quant_type '{}'", name, state.quant_type));
  if (!kernels::is_bnb4_block_size(state.block_size))
    throw Error("load", fmt::format("'{}': blocksize is {}, wanted a power of two from 32 to 4096",
                                    name, state.block_size));
  if (!std::isfinite(state.offset))
    throw Error("load", fmt::format("'{}': nested_offset is not finite", name));
  return state;
}

at::Tensor finite(at::Tensor part, const char* name) {
  if (!part.isfinite().all().item<bool>())
    throw Error("load", fmt::format("'{}' holds values that are not finite", name));
  return part;
}

// bitsandbytes uses its own table whatever the file says; another table means another type.
void check_map(const at::Tensor& map, const float* table, const char* name) {
  const auto* values = map.const_data_ptr<float>();
  for (int64_t i = 0; i < map.numel(); ++i)
    if (!(std::abs(values[i] - table[i]) <= 1e-6f))
      throw Error("load", fmt::format("'{}'[{}] is {}, wanted {}", name, i, values[i], table[i]));
}

// With quant_storage other than uint8 the same bytes have another dtype.
at::Tensor code_bytes(const StoredParts& parts, int64_t count) {
  const auto bytes = required_part(parts, "weight").contiguous().view({-1}).view(at::kByte);
  if (bytes.numel() != count)
    throw Error("load",
                fmt::format("'weight' holds {} bytes of codes, wanted {}", bytes.numel(), count));
  return bytes;
}

kernels::Bnb4Type kernel_type(Format format) {
  return format == Format::nf4 ? kernels::Bnb4Type::nf4 : kernels::Bnb4Type::fp4;
}

at::Tensor floats(const float* values, int64_t n) {
  auto result = at::empty({n}, at::TensorOptions().dtype(at::kFloat));
  std::copy_n(values, n, result.mutable_data_ptr<float>());
  return result;
}

// As Python writes a float: the shortest decimal that reads back, and never without a point.
std::string python_float(double value) {
  auto text = fmt::format("{}", value);
  return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
}

StoredParts bnb4_parts(const Weight& w, at::ScalarType dtype) {
  const bool nested = w.parts.size() == 6;
  const std::string type = w.format == Format::nf4 ? "nf4" : "fp4";
  Json state = {{"quant_type", type},
                {"blocksize", w.parts[2].item<int64_t>()},
                {"dtype", dtype_name(dtype)},
                {"shape", {w.out, w.in}}};
  StoredParts parts = {
      {"weight", w.parts[0].reshape({-1, 1})},
      {"weight.absmax", w.parts[1].reshape({-1})},
      {"weight.quant_map", floats(kernels::bnb4_table(kernel_type(w.format)), 16)}};
  if (nested) {
    state["nested_blocksize"] = kNestedBlock;
    state["nested_dtype"] = "float32";
    state["nested_offset"] = static_cast<double>(w.parts[5].item<float>());
    parts["weight.nested_absmax"] = w.parts[3].reshape({-1});
    parts["weight.nested_quant_map"] = w.parts[4].reshape({-1});
  }
  // Python's json.dumps puts a space after each separator.
  std::string text = "{";
  for (const auto& [key, value] : state.items()) {
    auto shown = value.dump();
    if (key == "shape") shown = fmt::format("[{}, {}]", w.out, w.in);
    if (key == "nested_offset") shown = python_float(value.get<double>());
    text += fmt::format("{}\"{}\": {}", text.size() > 1 ? ", " : "", key, shown);
  }
  text += "}";
  auto bytes = at::empty({static_cast<int64_t>(text.size())}, at::TensorOptions().dtype(at::kByte));
  std::memcpy(bytes.mutable_data_ptr<uint8_t>(), text.data(), text.size());
  parts[kState + type] = bytes;
  return parts;
}

class BitsAndBytes final : public Checkpoint {
 public:
  explicit BitsAndBytes(const std::string& text) {
    const auto json = Json::parse(text);
    const auto flag = [&](const char* name) {
      return json.contains(name) && json.at(name).is_boolean() && json.at(name).get<bool>();
    };
    eight_bit_ = flag("load_in_8bit") || flag("_load_in_8bit");
    const bool four_bit = flag("load_in_4bit") || flag("_load_in_4bit");
    if (eight_bit_ == four_bit)
      throw Error("load",
                  "quantization_config of bitsandbytes has exactly one of load_in_4bit and "
                  "load_in_8bit true");
  }

  bool packed(const StoredParts& parts) const override {
    const auto it = parts.find("weight");
    if (it == parts.end()) return false;
    if (eight_bit_) return it->second.scalar_type() == at::kChar;
    return parts.size() > 1 || !it->second.is_floating_point();
  }
  std::pair<int64_t, int64_t> shape(const StoredParts& parts) const override {
    const auto sizes = eight_bit_ ? required_part(parts, "weight").sizes().vec()
                                  : read_state(parts, state_name(parts)).shape;
    if (sizes.size() != 2)
      throw Error("load", fmt::format("a packed matrix has {} dimensions", sizes.size()));
    return {sizes[0], sizes[1]};
  }
  Weight read(const StoredParts& parts, int64_t out, int64_t in) const override {
    return eight_bit_ ? weight_from_bnb8(parts, out, in) : weight_from_bnb4(parts, out, in);
  }

 private:
  bool eight_bit_ = false;
};

const bool registered = register_checkpoint(
    "bitsandbytes", [](const std::string& text) { return std::make_unique<BitsAndBytes>(text); });

}  // namespace

Weight weight_from_bnb4(const StoredParts& parts, int64_t out, int64_t in) {
  const auto name = state_name(parts);
  const auto state = read_state(parts, name);
  if (state.shape != std::vector<int64_t>{out, in})
    throw Error("load", fmt::format("'{}' says shape {}, wanted [{}, {}]", name,
                                    Json(state.shape).dump(), out, in));
  std::vector<std::string> known = {"weight", "weight.absmax", "weight.quant_map", name};
  if (state.nested) known.insert(known.end(), {"weight.nested_absmax", "weight.nested_quant_map"});
  refuse_other_parts(parts, known);

  const auto format = state.quant_type == "nf4" ? Format::nf4 : Format::fp4;
  const int64_t count = out * in, blocks = kernels::bnb4_blocks(count, state.block_size);
  auto codes = code_bytes(parts, kernels::bnb4_bytes(count));
  if (in % state.block_size == 0) codes = codes.view({out, in / 2});
  const auto block_size = at::full({1}, state.block_size, at::TensorOptions().dtype(at::kLong));
  check_map(take_part(parts, "weight.quant_map", at::kFloat, 16),
            kernels::bnb4_table(kernel_type(format)), "weight.quant_map");
  if (!state.nested)
    return {{codes, finite(take_part(parts, "weight.absmax", at::kFloat, blocks), "weight.absmax"),
             block_size},
            format,
            out,
            in};
  const auto nested_blocks = (blocks + kNestedBlock - 1) / kNestedBlock;
  const auto offset = at::full({1}, state.offset, at::TensorOptions().dtype(at::kFloat));
  return {{codes, take_part(parts, "weight.absmax", at::kByte, blocks), block_size,
           finite(take_part(parts, "weight.nested_absmax", at::kFloat, nested_blocks),
                  "weight.nested_absmax"),
           finite(take_part(parts, "weight.nested_quant_map", at::kFloat, 256),
                  "weight.nested_quant_map"),
           offset},
          format,
          out,
          in};
}

Weight weight_from_bnb8(const StoredParts& parts, int64_t out, int64_t in) {
  refuse_other_parts(parts, {"weight", "SCB", "weight_format"});
  const auto it = parts.find("weight_format");
  if (it != parts.end() && it->second.numel() == 1 && it->second.to(at::kLong).item<int64_t>() != 0)
    throw Error("load", fmt::format("'weight_format' is {}; only 0 (rows) is supported",
                                    it->second.to(at::kLong).item<int64_t>()));
  return {{take_part(parts, "weight", at::kChar, out * in).view({out, in}),
           finite(take_part(parts, "SCB", at::kFloat, out), "SCB").view({out})},
          Format::int8_rows,
          out,
          in};
}

StoredParts bnb_parts(const Weight& w, at::ScalarType dtype) {
  if (w.format == Format::nf4 || w.format == Format::fp4) return bnb4_parts(w, dtype);
  if (w.format != Format::int8_rows)
    throw Error("save", fmt::format("bitsandbytes has no place for a {} weight; it holds nf4, fp4 "
                                    "and int8",
                                    form_of(w.format).name()));
  return {{"weight", w.parts[0].view({w.out, w.in})},
          {"SCB", w.parts[1].view({w.out})},
          {"weight_format", at::zeros({}, at::TensorOptions().dtype(at::kByte))}};
}

}  // namespace budwood::quant
