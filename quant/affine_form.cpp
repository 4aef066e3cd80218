#include <fmt/format.h>

#include <budwood/quant/error.h>
#include <budwood/quant/kernels/affine.h>
#include <budwood/quant/kernels/int8.h>
#include <budwood/quant/packed_form.h>

namespace budwood::quant {
namespace {

enum Part : size_t { kCodes, kScales, kZeros, kGroupSize };

class Affine final : public PackedForm {
 public:
  explicit Affine(int bits) : bits_(bits) {}
  std::string name() const override { return fmt::format("affine{}", bits_); }

  void check(const Weight& w) const override {
    check_parts(w, 4, 4);
    const int64_t group_size = size_in_part(w, kGroupSize, "group size");
    const int64_t groups =
        group_size ? kernels::affine_groups(w.in, group_size) : w.parts[kScales].numel() / w.out;
    check_part(w, kCodes, "codes", at::kByte, w.out * kernels::affine_row_bytes(bits_, w.in));
    check_part(w, kScales, "scales", at::kFloat, w.out * groups);
    // Zeros are floats once an adapter has been merged into them.
    const bool integers = w.parts[kZeros].scalar_type() == at::kByte;
    check_part(w, kZeros, "zero points", integers ? at::kByte : at::kFloat, w.out * groups);
  }

 protected:
  PackedRows open(const Weight& w) const override {
    kernels::AffineView view{.bits = bits_,
                             .codes = w.parts[kCodes].const_data_ptr<uint8_t>(),
                             .scales = w.parts[kScales].const_data_ptr<float>(),
                             .rows = w.out,
                             .cols = w.in,
                             .group_size = *w.parts[kGroupSize].const_data_ptr<int64_t>()};
    if (w.parts[kZeros].scalar_type() == at::kByte)
      view.zero_points = w.parts[kZeros].const_data_ptr<uint8_t>();
    else
      view.zeros = w.parts[kZeros].const_data_ptr<float>();
    return {w.out, w.in, [view](int64_t row, float* dst) {
              dequantize_affine_row(view, row, 0, view.cols, kernels::FloatType::fp32, dst);
            }};
  }

 private:
  int bits_;
};

class Int8Rows final : public PackedForm {
 public:
  std::string name() const override { return "int8_rows"; }

  void check(const Weight& w) const override {
    check_parts(w, 2, 2);
    check_part(w, 0, "codes", at::kChar, w.out * w.in);
    check_part(w, 1, "scales", at::kFloat, w.out);
  }

 protected:
  PackedRows open(const Weight& w) const override {
    const int8_t* codes = w.parts[0].const_data_ptr<int8_t>();
    const float* scales = w.parts[1].const_data_ptr<float>();
    return {w.out, w.in, [=, cols = w.in](int64_t row, float* dst) {
              kernels::dequantize_int8_row(codes + row * cols, scales[row], cols,
                                           kernels::FloatType::fp32, dst);
            }};
  }
};

const bool registered = register_form(Format::affine4, std::make_unique<Affine>(4)) &&
                        register_form(Format::affine8, std::make_unique<Affine>(8)) &&
                        register_form(Format::int8_rows, std::make_unique<Int8Rows>());

}  // namespace
}  // namespace budwood::quant
