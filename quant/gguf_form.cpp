#include <fmt/format.h>

#include <budwood/quant/error.h>
#include <budwood/quant/packed_form.h>

namespace budwood::quant {
namespace {

using kernels::GgmlType;

class Gguf final : public PackedForm {
 public:
  explicit Gguf(GgmlType type) : type_(type) {}
  std::string name() const override { return fmt::format("GGUF {}", ggml_type_name(type_)); }

  void check(const Weight& w) const override {
    check_parts(w, 1, 1);
    if (w.in % kernels::ggml_type_traits(type_).block != 0)
      throw Error("weight",
                  fmt::format("a {} weight has rows of whole blocks of {}, found [{}, {}]", name(),
                              kernels::ggml_type_traits(type_).block, w.out, w.in));
    check_part(w, 0, "blocks", at::kByte, w.out * row_bytes(type_, w.in));
  }

 protected:
  std::unique_ptr<kernels::Matrix> open(const Weight& w) const override {
    return std::make_unique<kernels::GgufMatrix>(type_, w.parts[0].const_data_ptr<uint8_t>(), w.out,
                                                 w.in);
  }

 private:
  GgmlType type_;
};

const bool registered = [] {
  for (const auto type : {GgmlType::q4_0, GgmlType::q4_1, GgmlType::q5_0, GgmlType::q5_1,
                          GgmlType::q8_0, GgmlType::q4_k, GgmlType::q5_k, GgmlType::q6_k})
    register_form(static_cast<Format>(16 + static_cast<int64_t>(type)),
                  std::make_unique<Gguf>(type));
  return true;
}();

}  // namespace
}  // namespace budwood::quant
