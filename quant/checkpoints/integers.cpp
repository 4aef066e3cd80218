#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/quant/checkpoints/integers.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/affine.h>
#include <nlohmann/json.hpp>

namespace budwood::quant {
namespace {

constexpr int64_t kVersion = 1;
constexpr const char* kOrder = "weight.column_order";

at::Tensor finite(at::Tensor part, const char* name) {
  if (!part.isfinite().all().item<bool>())
    throw Error("load", fmt::format("'{}' holds values that are not finite", name));
  return part;
}

class Integers final : public Checkpoint {
 public:
  explicit Integers(const std::string& text) {
    try {
      const auto json = nlohmann::json::parse(text);
      const auto version = json.at("version").get<int64_t>();
      if (version < 1 || version > kVersion)
        throw Error("load", fmt::format("quantization_config is of version {}, this program reads "
                                        "up to {}",
                                        version, kVersion));
      bits_ = json.at("bits").get<int>();
    } catch (const nlohmann::json::exception& e) {
      throw Error("load", fmt::format("quantization_config: {}", e.what()));
    }
    if (bits_ != 4 && bits_ != 8)
      throw Error("load", fmt::format("quantization_config says {} bits, wanted 4 or 8", bits_));
  }

  bool packed(const StoredParts& parts) const override { return parts.contains("weight.codes"); }
  std::pair<int64_t, int64_t> shape(const StoredParts& parts) const override {
    const auto codes = required_part(parts, "weight.codes");
    if (codes.dim() != 2)
      throw Error("load", fmt::format("'weight.codes' has {} dimensions, wanted 2", codes.dim()));
    return {codes.size(0), codes.size(1) * 8 / bits_};
  }
  Weight read(const StoredParts& parts, int64_t out, int64_t in) const override {
    return weight_from_integers(parts, bits_, out, in);
  }

 private:
  int bits_ = 0;
};

const bool registered = register_checkpoint(
    "budwood", [](const std::string& text) { return std::make_unique<Integers>(text); });

}  // namespace

Weight weight_from_integers(const StoredParts& parts, int bits, int64_t out, int64_t in) {
  refuse_other_parts(
      parts, {"weight.codes", "weight.scales", "weight.zeros", "weight.group_size", kOrder});
  const auto size = take_part(parts, "weight.group_size", at::kLong, 1);
  const auto group_size = size.item<int64_t>();
  if (group_size < 1)
    throw Error("load", fmt::format("'weight.group_size' is {}, wanted at least 1", group_size));
  const int64_t groups = kernels::affine_groups(in, group_size);
  const auto codes =
      take_part(parts, "weight.codes", at::kByte, out * kernels::affine_row_bytes(bits, in));
  const auto scales = take_part(parts, "weight.scales", at::kFloat, out * groups);
  const auto it = parts.find("weight.zeros");
  const bool floats = it != parts.end() && it->second.scalar_type() == at::kFloat;
  auto zeros = take_part(parts, "weight.zeros", floats ? at::kFloat : at::kByte, out * groups);
  if (floats) zeros = finite(zeros, "weight.zeros");
  Weight w{{codes, finite(scales, "weight.scales"), zeros, size},
           bits == 4 ? Format::affine4 : Format::affine8,
           out,
           in};
  if (parts.contains(kOrder)) w.parts.push_back(take_part(parts, kOrder, at::kInt, in));
  return Weight::from_parts(std::move(w.parts), static_cast<int64_t>(w.format), out, in);
}

StoredParts integer_parts(const Weight& w) {
  if (w.format != Format::affine4 && w.format != Format::affine8)
    throw Error("save", fmt::format("a {} weight is not a group-affine integer weight",
                                    form_of(w.format).name()));
  StoredParts parts = {{"weight.codes", w.parts[0]},
                       {"weight.scales", w.parts[1]},
                       {"weight.zeros", w.parts[2]},
                       {"weight.group_size", w.parts[3]}};
  if (w.parts.size() > 4) parts[kOrder] = w.parts[4];
  return parts;
}

}  // namespace budwood::quant
