#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <budwood/quant/checkpoints/awq.h>
#include <budwood/quant/checkpoints/checkpoint.h>
#include <budwood/quant/checkpoints/checkpoint_part.h>
#include <budwood/quant/checkpoints/config_json.h>
#include <budwood/quant/kernels/affine.h>
#include <algorithm>
#include <array>
#include <cctype>

namespace budwood::quant {
namespace {

constexpr const char* kWhere = "weight_from_awq";

// Bits 4i..4i+3 of a word belong to this one of its 8 outputs.
constexpr std::array<int64_t, 8> kOutput = {0, 2, 4, 6, 1, 3, 5, 7};
// Words of a row that one thread reads together: a cache line.
constexpr int64_t kTile = 16;

// Words [rows, out / 8] to codes, one a byte, of each output: set(output, row, code).
template <class Set>
void for_codes(const at::Tensor& words, const Set& set) {
  const int64_t rows = words.size(0), width = words.size(1);
  const auto* from = words.const_data_ptr<int32_t>();
  at::parallel_for(0, (width + kTile - 1) / kTile, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kTile, last = std::min(width, end * kTile);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = first; k < last; ++k) {
        const auto word = static_cast<uint32_t>(from[row * width + k]);
        for (size_t i = 0; i < 8; ++i)
          set(8 * k + kOutput[i], row, static_cast<uint8_t>(word >> 4 * i & 15));
      }
  });
}

}  // namespace

AwqConfig AwqConfig::from_json(const std::string& text) {
  const ConfigJson json("awq", text);
  AwqConfig config;
  config.bits = json.get<int64_t>(json.has("w_bit") ? "w_bit" : "bits", 4);
  if (config.bits != 4) json.refuse(fmt::format("bits is {}; Budwood reads 4", config.bits));
  config.group_size = json.get<int64_t>(json.has("q_group_size") ? "q_group_size" : "group_size",
                                        config.group_size);
  if (config.group_size < 1)
    json.refuse(fmt::format("group_size is {}; wanted 1 or more", config.group_size));
  if (!json.get("zero_point", true))
    json.refuse("zero_point is false; Budwood reads files with zero points");
  auto version = json.get<std::string>("version", "gemm");
  std::transform(version.begin(), version.end(), version.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (version != "gemm") json.refuse(fmt::format("version is '{}'; Budwood reads 'gemm'", version));
  if (json.has("modules_to_not_convert"))
    for (const auto& name : json["modules_to_not_convert"]) {
      if (!name.is_string()) json.refuse("modules_to_not_convert is not a list of texts");
      config.modules_to_not_convert.push_back(name.get<std::string>());
    }
  return config;
}

Weight weight_from_awq(const at::Tensor& qweight, const at::Tensor& qzeros,
                       const at::Tensor& scales, int64_t bits, int64_t group_size, int64_t out,
                       int64_t in) {
  if (bits != 4) throw Error(kWhere, fmt::format("{} bits; Budwood reads 4", bits));
  if (group_size < 1 || out < 1 || in < 1 || in % group_size != 0 || out % 8 != 0)
    throw Error(kWhere, fmt::format("an AWQ weight has in divisible by the group size and out by "
                                    "8, found [{}, {}] with groups of {}",
                                    out, in, group_size));
  const int64_t groups = in / group_size, bytes = kernels::affine_row_bytes(4, in);
  const auto words = checkpoint_part(kWhere, "qweight", qweight, {in, out / 8});
  const auto zero_words = checkpoint_part(kWhere, "qzeros", qzeros, {groups, out / 8});
  auto codes = at::zeros({out, bytes}, at::TensorOptions().dtype(at::kByte));
  auto zeros = at::empty({out, groups}, at::TensorOptions().dtype(at::kByte));
  auto* code = codes.mutable_data_ptr<uint8_t>();
  auto* zero = zeros.mutable_data_ptr<uint8_t>();
  for_codes(words, [=](int64_t o, int64_t i, uint8_t q) {
    code[o * bytes + i / 2] |= static_cast<uint8_t>(q << (i & 1) * 4);
  });
  for_codes(zero_words, [=](int64_t o, int64_t g, uint8_t z) { zero[o * groups + g] = z; });
  return {{codes, checkpoint_scales(kWhere, scales, groups, out), zeros,
           at::full({1}, group_size, at::TensorOptions().dtype(at::kLong))},
          Format::affine4,
          out,
          in};
}

namespace {

class Awq final : public Checkpoint {
 public:
  explicit Awq(const std::string& text) : config_(AwqConfig::from_json(text)) {}
  bool packed(const StoredParts& parts) const override { return parts.contains("qweight"); }
  std::pair<int64_t, int64_t> shape(const StoredParts& parts) const override {
    const auto words = required_part(parts, "qweight");
    if (words.dim() != 2)
      throw Error(kWhere, fmt::format("qweight has {} dimensions; wanted 2", words.dim()));
    return {words.size(1) * 8, words.size(0)};
  }
  Weight read(const StoredParts& parts, int64_t out, int64_t in) const override {
    refuse_other_parts(parts, {"qweight", "qzeros", "scales"});
    return weight_from_awq(required_part(parts, "qweight"), required_part(parts, "qzeros"),
                           required_part(parts, "scales"), config_.bits, config_.group_size, out,
                           in);
  }

 private:
  AwqConfig config_;
};

const bool registered =
    register_checkpoint("awq", [](const std::string& text) { return std::make_unique<Awq>(text); });

}  // namespace

}  // namespace budwood::quant
