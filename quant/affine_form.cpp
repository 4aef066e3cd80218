#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/quant/error.h>
#include <budwood/quant/kernels/affine.h>
#include <budwood/quant/kernels/int8.h>
#include <budwood/quant/packed_form.h>
#include <vector>

namespace budwood::quant {
namespace {

enum Part : size_t { kCodes, kScales, kZeros, kGroupSize, kOrder };

class Affine final : public PackedForm {
 public:
  explicit Affine(int bits) : bits_(bits) {}
  std::string name() const override { return fmt::format("affine{}", bits_); }

  void check(const Weight& w) const override {
    check_parts(w, 4, 5);
    const int64_t groups = kernels::affine_groups(w.in, size_in_part(w, kGroupSize, "group size"));
    check_part(w, kCodes, "codes", at::kByte, w.out * kernels::affine_row_bytes(bits_, w.in));
    check_part(w, kScales, "scales", at::kFloat, w.out * groups);
    // Zeros are floats once an adapter has been merged into them.
    const bool integers = w.parts[kZeros].scalar_type() == at::kByte;
    check_part(w, kZeros, "zero points", integers ? at::kByte : at::kFloat, w.out * groups);
    if (ordered(w)) check_order(w);
  }

  // With an order the products take the columns as they are stored, and x or dx is permuted.
  at::Tensor linear(const Weight& w, const at::Tensor& x) const override {
    if (!ordered(w)) return PackedForm::linear(w, x);
    return PackedForm::linear(as_stored(w), x.index_select(-1, w.parts[kOrder]));
  }
  at::Tensor backward_input(const Weight& w, const at::Tensor& grad) const override {
    if (!ordered(w)) return PackedForm::backward_input(w, grad);
    const auto stored = PackedForm::backward_input(as_stored(w), grad);
    return at::empty_like(stored).index_copy_(-1, w.parts[kOrder].to(at::kLong), stored);
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
    if (ordered(w)) {
      const auto* order = w.parts[kOrder].const_data_ptr<int32_t>();
      return {w.out, w.in, [view, order](int64_t row, float* dst) {
                std::vector<float> stored(static_cast<size_t>(view.cols));
                dequantize_affine_row(view, row, 0, view.cols, kernels::FloatType::fp32,
                                      stored.data());
                for (size_t p = 0; p < stored.size(); ++p) dst[order[p]] = stored[p];
              }};
    }
    return {w.out, w.in, [view](int64_t row, float* dst) {
              dequantize_affine_row(view, row, 0, view.cols, kernels::FloatType::fp32, dst);
            }};
  }

 private:
  static bool ordered(const Weight& w) { return w.parts.size() > kOrder; }
  static Weight as_stored(Weight w) {
    w.parts.resize(kOrder);
    return w;
  }

  void check_order(const Weight& w) const {
    check_part(w, kOrder, "order of the columns", at::kInt, w.in);
    const auto* order = w.parts[kOrder].const_data_ptr<int32_t>();
    std::vector<bool> seen(static_cast<size_t>(w.in));
    for (int64_t p = 0; p < w.in; ++p) {
      if (order[p] < 0 || order[p] >= w.in || seen[static_cast<size_t>(order[p])])
        throw Error("weight", fmt::format("the order of the columns of a {} weight has {} at place "
                                          "{}; wanted each of 0 to {} once",
                                          name(), order[p], p, w.in - 1));
      seen[static_cast<size_t>(order[p])] = true;
    }
  }

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
