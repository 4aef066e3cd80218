#include <fmt/format.h>

#include <budwood/quant/device_rows.h>
#include <budwood/quant/error.h>
#include <budwood/quant/packed_form.h>

namespace budwood::quant {
namespace {

using kernels::Bnb4Type;

// bitsandbytes knows no other.
constexpr int64_t kNestedBlock = 256;

enum Part : size_t { kCodes, kAbsmax, kBlockSize, kNestedAbsmax, kMap, kOffset };

class Bnb4 final : public PackedForm {
 public:
  explicit Bnb4(Bnb4Type type) : type_(type) {}
  std::string name() const override { return type_ == Bnb4Type::nf4 ? "nf4" : "fp4"; }

  void check(const Weight& w) const override {
    check_parts(w, 3, 6);
    const bool nested = w.parts.size() == 6;
    if (!nested && w.parts.size() != 3)
      throw Error("weight",
                  fmt::format("a {} weight has 3 parts, or 6 with nested scales, found {}", name(),
                              w.parts.size()));
    const int64_t stated = size_in_part(w, kBlockSize, "block size");
    const int64_t block_size =
        stated ? stated : bnb4_block_size(w.out * w.in, w.parts[kAbsmax].numel());
    if (!kernels::is_bnb4_block_size(block_size))
      throw Error("weight",
                  fmt::format("the block size of a {} weight is a power of two from 32 to "
                              "4096, found {}",
                              name(), block_size));
    const int64_t count = w.out * w.in, blocks = kernels::bnb4_blocks(count, block_size);
    check_part(w, kCodes, "codes", at::kByte, kernels::bnb4_bytes(count));
    check_part(w, kAbsmax, nested ? "scale codes" : "scales", nested ? at::kByte : at::kFloat,
               blocks);
    if (!nested) return;
    check_part(w, kNestedAbsmax, "nested scales", at::kFloat,
               (blocks + kNestedBlock - 1) / kNestedBlock);
    check_part(w, kMap, "entries of the nested map", at::kFloat, 256);
    check_part(w, kOffset, "nested offset", at::kFloat, 1);
  }

 protected:
  std::unique_ptr<kernels::Matrix> open(const Weight& w) const override {
    kernels::Bnb4View view{.type = type_,
                           .codes = w.parts[kCodes].const_data_ptr<uint8_t>(),
                           .count = w.out * w.in,
                           .block_size = *w.parts[kBlockSize].const_data_ptr<int64_t>()};
    if (w.parts.size() == 3)
      view.absmax = w.parts[kAbsmax].const_data_ptr<float>();
    else
      view.nested = {.codes = w.parts[kAbsmax].const_data_ptr<uint8_t>(),
                     .map = w.parts[kMap].const_data_ptr<float>(),
                     .absmax = w.parts[kNestedAbsmax].const_data_ptr<float>(),
                     .offset = *w.parts[kOffset].const_data_ptr<float>(),
                     .block_size = kNestedBlock};
    return std::make_unique<kernels::Bnb4Matrix>(view, w.in);
  }

 private:
  Bnb4Type type_;
};

const bool registered = register_form(Format::nf4, std::make_unique<Bnb4>(Bnb4Type::nf4)) &&
                        register_form(Format::fp4, std::make_unique<Bnb4>(Bnb4Type::fp4));

}  // namespace
}  // namespace budwood::quant
