#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <budwood/quant/checkpoints/checkpoint.h>
#include <budwood/quant/checkpoints/checkpoint_part.h>
#include <budwood/quant/checkpoints/config_json.h>
#include <budwood/quant/checkpoints/gptq.h>
#include <budwood/quant/kernels/affine.h>
#include <bit>
#include <vector>

namespace budwood::quant {
namespace {

constexpr const char* kWhere = "weight_from_gptq";

// A word holds the codes of consecutive rows, lowest bits first: on a little-endian machine its
// bytes are those of our own rows.
static_assert(std::endian::native == std::endian::little);

at::Tensor bytes_of(const at::Tensor& words) {
  return words.clone(at::MemoryFormat::Contiguous).view(at::kByte);
}

// [groups, out * bits / 32] words -> zero points [out, groups].
at::Tensor zero_points(const at::Tensor& words, int64_t bits, bool v2, int64_t out) {
  // The writer subtracted 1 from each field of the whole word, with borrows; this takes it back.
  const auto one_each = static_cast<int32_t>(bits == 4 ? 0x11111111 : 0x01010101);
  const auto plain = v2 ? words : words + one_each;
  const auto bytes = bytes_of(plain);
  auto fields = bytes;
  if (bits == 4) fields = at::stack({bytes.bitwise_and(15), bytes.__rshift__(4)}, 2);
  return fields.reshape({words.size(0), out}).t().contiguous();
}

// The columns group by group; throws unless each group but the last is full.
at::Tensor order_of(const at::Tensor& g_idx, int64_t size) {
  const auto order = std::get<1>(at::sort(g_idx, /*stable=*/true, 0, /*descending=*/false));
  const auto* column = order.const_data_ptr<int64_t>();
  const auto* group = g_idx.const_data_ptr<int32_t>();
  for (int64_t p = 0; p < order.numel(); ++p)
    if (group[column[p]] != p / size)
      throw Error(kWhere, fmt::format("g_idx puts column {} into group {}; wanted groups of {} "
                                      "columns, numbered from 0",
                                      column[p], group[column[p]], size));
  return order;
}

void reorder(at::Tensor& codes, int64_t bits, const at::Tensor& order) {
  const int64_t bytes = codes.size(1), in = order.numel();
  auto* code = codes.mutable_data_ptr<uint8_t>();
  const auto* column = order.const_data_ptr<int64_t>();
  at::parallel_for(0, codes.size(0), 16, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> from(static_cast<size_t>(in)), to(static_cast<size_t>(in));
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* here = code + row * bytes;
      kernels::unpack_affine_codes(static_cast<int>(bits), here, in, from.data());
      for (size_t p = 0; p < to.size(); ++p) to[p] = from[static_cast<size_t>(column[p])];
      kernels::pack_affine_codes(static_cast<int>(bits), to.data(), in, here);
    }
  });
}

}  // namespace

GptqConfig GptqConfig::from_json(const std::string& text) {
  const ConfigJson json("gptq", text);
  GptqConfig config;
  config.bits = json.get<int64_t>("bits", 4);
  if (config.bits != 4 && config.bits != 8)
    json.refuse(fmt::format("bits is {}; Budwood reads 4 and 8", config.bits));
  config.group_size = json.get<int64_t>("group_size", 128);
  if (config.group_size < 1 && config.group_size != -1)
    json.refuse(fmt::format("group_size is {}; wanted 1 or more, or -1", config.group_size));
  config.desc_act = json.get("desc_act", false);
  config.sym = json.get("sym", true);
  const auto format = json.get<std::string>("checkpoint_format", "gptq");
  if (format != "gptq" && format != "gptq_v2")
    json.refuse(
        fmt::format("checkpoint_format is '{}'; Budwood reads 'gptq' and 'gptq_v2'", format));
  config.v2 = format == "gptq_v2";
  if (json.get("is_marlin_format", false)) json.refuse("is_marlin_format is true");
  if (const auto pack = json.get<std::string>("pack_dtype", "int32"); pack != "int32")
    json.refuse(fmt::format("pack_dtype is '{}'; Budwood reads 'int32'", pack));
  if (json.has("dynamic") && !json["dynamic"].empty())
    json.refuse("dynamic gives modules settings of their own, which Budwood does not read");
  return config;
}

Weight weight_from_gptq(const at::Tensor& qweight, const at::Tensor& qzeros,
                        const at::Tensor& scales, const std::optional<at::Tensor>& g_idx,
                        int64_t bits, int64_t group_size, bool v2, int64_t out, int64_t in) {
  if (bits != 4 && bits != 8)
    throw Error(kWhere, fmt::format("{} bits; Budwood reads 4 and 8", bits));
  const int64_t per_word = 32 / bits, size = group_size == -1 ? in : group_size;
  if (size < 1) throw Error(kWhere, fmt::format("group size {}; wanted 1 or more, or -1", size));
  if (out < 1 || in < 1 || out % per_word != 0 || in % per_word != 0)
    throw Error(kWhere,
                fmt::format("a {}-bit weight has in and out divisible by {}, found [{}, {}]", bits,
                            per_word, out, in));
  const int64_t groups = kernels::affine_groups(in, size);
  const auto words = checkpoint_part(kWhere, "qweight", qweight, {in / per_word, out});
  const auto zeros = checkpoint_part(kWhere, "qzeros", qzeros, {groups, out / per_word});
  Weight w{{bytes_of(words.t()), checkpoint_scales(kWhere, scales, groups, out),
            zero_points(zeros, bits, v2, out),
            at::full({1}, size, at::TensorOptions().dtype(at::kLong))},
           bits == 4 ? Format::affine4 : Format::affine8,
           out,
           in};
  if (g_idx) {
    const auto order = order_of(checkpoint_part(kWhere, "g_idx", *g_idx, {in}), size);
    if (!order.equal(at::arange(in, at::kLong))) {
      reorder(w.parts[0], bits, order);
      w.parts.push_back(order.to(at::kInt));
    }
  }
  return w;
}

namespace {

class Gptq final : public Checkpoint {
 public:
  explicit Gptq(const std::string& text) : config_(GptqConfig::from_json(text)) {}
  bool packed(const StoredParts& parts) const override { return parts.contains("qweight"); }
  std::pair<int64_t, int64_t> shape(const StoredParts& parts) const override {
    const auto words = required_part(parts, "qweight");
    if (words.dim() != 2)
      throw Error(kWhere, fmt::format("qweight has {} dimensions; wanted 2", words.dim()));
    return {words.size(1), words.size(0) * 32 / config_.bits};
  }
  Weight read(const StoredParts& parts, int64_t out, int64_t in) const override {
    refuse_other_parts(parts, {"qweight", "qzeros", "scales", "g_idx"});
    std::optional<at::Tensor> g_idx;
    if (parts.contains("g_idx")) g_idx = parts.at("g_idx");
    return weight_from_gptq(required_part(parts, "qweight"), required_part(parts, "qzeros"),
                            required_part(parts, "scales"), g_idx, config_.bits, config_.group_size,
                            config_.v2, out, in);
  }

 private:
  GptqConfig config_;
};

const bool registered = register_checkpoint(
    "gptq", [](const std::string& text) { return std::make_unique<Gptq>(text); });

}  // namespace

}  // namespace budwood::quant
