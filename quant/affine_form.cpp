#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/quant/error.h>
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
    const int64_t group_size = size_in_part(w, kGroupSize, "group size");
    const int64_t groups =
        group_size ? kernels::affine_groups(w.in, group_size) : w.parts[kScales].numel() / w.out;
    check_part(w, kCodes, "codes", at::kByte, w.out * kernels::affine_row_bytes(bits_, w.in));
    check_part(w, kScales, "scales", at::kFloat, w.out * groups);
    // Zeros are floats once an adapter has been merged into them.
    const bool integers = w.parts[kZeros].scalar_type() == at::kByte;
    check_part(w, kZeros, "zero points", integers ? at::kByte : at::kFloat, w.out * groups);
    if (ordered(w)) check_order(w);
  }

  // With an order the products take the columns as they are stored, and x or dx is permuted.
  at::Tensor linear_plus(const Weight& w, const at::Tensor& x, const Terms& terms) const override {
    if (!ordered(w)) return PackedForm::linear_plus(w, x, terms);
    return PackedForm::linear_plus(as_stored(w), x.index_select(-1, w.parts[kOrder]), terms);
  }
  at::Tensor backward_input_plus(const Weight& w, const at::Tensor& grad,
                                 const Terms& terms) const override {
    if (!ordered(w)) return PackedForm::backward_input_plus(w, grad, terms);
    const Terms gain{.gain = terms.gain};
    return plus(in_order(w, PackedForm::backward_input_plus(as_stored(w), grad, gain)), terms);
  }

  at::Tensor rows(const Weight& w, int64_t begin, int64_t end,
                  at::ScalarType dtype) const override {
    if (!ordered(w)) return PackedForm::rows(w, begin, end, dtype);
    return in_order(w, PackedForm::rows(as_stored(w), begin, end, dtype));
  }
  at::Tensor gather(const Weight& w, const at::Tensor& ids, at::ScalarType dtype) const override {
    if (!ordered(w)) return PackedForm::gather(w, ids, dtype);
    return in_order(w, PackedForm::gather(as_stored(w), ids, dtype));
  }

 protected:
  std::unique_ptr<kernels::Matrix> open(const Weight& w) const override {
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
    return std::make_unique<kernels::AffineMatrix>(view);
  }

 private:
  static bool ordered(const Weight& w) { return w.parts.size() > kOrder; }
  // Columns from the order of the codes to that of W.
  static at::Tensor in_order(const Weight& w, const at::Tensor& stored) {
    return at::empty_like(stored).index_copy_(-1, w.parts[kOrder].to(at::kLong), stored);
  }
  static Weight as_stored(Weight w) {
    w.parts.resize(kOrder);
    return w;
  }

  void check_order(const Weight& w) const {
    check_part(w, kOrder, "order of the columns", at::kInt, w.in);
    if (!w.parts[kOrder].is_cpu()) return;
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
  std::unique_ptr<kernels::Matrix> open(const Weight& w) const override {
    return std::make_unique<kernels::Int8Matrix>(w.parts[0].const_data_ptr<int8_t>(),
                                                 w.parts[1].const_data_ptr<float>(), w.out, w.in);
  }
};

const bool registered = register_form(Format::affine4, std::make_unique<Affine>(4)) &&
                        register_form(Format::affine8, std::make_unique<Affine>(8)) &&
                        register_form(Format::int8_rows, std::make_unique<Int8Rows>());

}  // namespace
}  // namespace budwood::quant
