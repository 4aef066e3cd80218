#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <budwood/quant/error.h>
#include <budwood/quant/fork.h>
#include <budwood/quant/kernels/half.h>
#include <budwood/quant/large_pages.h>
#include <budwood/quant/panels.h>
#include <budwood/quant/tensors.h>

namespace budwood::quant {
namespace {

// Decoded float64 elements of a panel per thread.
constexpr int64_t kPanelElements = 1 << 17;
// Elements that are worth handing to another thread.
constexpr int64_t kGrainElements = 1 << 14;

void require_cpu(const char* where, const at::Tensor& t) {
  if (!t.is_cpu())
    throw Error(where,
                fmt::format("packed weights are multiplied on the CPU, found a tensor on {}: "
                            "move the model to the CPU or load it with dense weights",
                            t.device().str()));
  if (!at::isFloatingType(t.scalar_type()))
    throw Error(where, fmt::format("wanted floating point values, found {}",
                                   c10::toString(t.scalar_type())));
}

int64_t grain_rows(const kernels::Matrix& w) {
  return std::max<int64_t>(1, kGrainElements / w.cols());
}

// One fp32 row in another dtype.
void convert_row(const float* src, int64_t n, at::ScalarType type, void* dst) {
  switch (type) {
    case at::kBFloat16:
      return kernels::fp32_to_bf16(src, static_cast<uint16_t*>(dst), n);
    case at::kHalf:
      return kernels::fp32_to_fp16(src, static_cast<uint16_t*>(dst), n);
    case at::kDouble:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(dst)[i] = src[i];
      return;
    default:
      throw Error("weight", fmt::format("a packed weight has no values in {}; wanted float32, "
                                        "bfloat16, float16 or float64",
                                        c10::toString(type)));
  }
}

// Rows row_of(0), row_of(1), ... to the rows of a contiguous matrix.
template <class RowOf>
void decode_into(const kernels::Matrix& w, at::Tensor& target, int64_t count, const RowOf& row_of) {
  const auto type = target.scalar_type();
  const int64_t cols = w.cols(), stride = cols * target.element_size();
  auto* base = static_cast<char*>(target.mutable_data_ptr());
  prepare_for_fork();
  at::parallel_for(0, count, grain_rows(w), [&](int64_t begin, int64_t end) {
    std::vector<float> row(type == at::kFloat ? 0 : static_cast<size_t>(cols));
    for (int64_t r = begin; r < end; ++r) {
      char* dst = base + r * stride;
      if (type == at::kFloat) {
        w.decode(row_of(r), 1, 0, cols, reinterpret_cast<float*>(dst), cols);
      } else {
        w.decode(row_of(r), 1, 0, cols, row.data(), cols);
        convert_row(row.data(), cols, type, dst);
      }
    }
  });
}

// Calls use(first row, panel [count, cols]) for all rows, in float64.
template <class Use>
void for_panels(const kernels::Matrix& w, const Use& use) {
  const int64_t count = at::get_num_threads() * kPanelElements / w.cols();
  const int64_t step = std::clamp<int64_t>(count, 1, w.rows());
  auto buffer = at::empty({step, w.cols()}, at::TensorOptions().dtype(at::kDouble));
  for (int64_t begin = 0; begin < w.rows(); begin += step) {
    auto panel = buffer.narrow(0, 0, std::min(step, w.rows() - begin));
    decode_into(w, panel, panel.size(0), [begin](int64_t r) { return begin + r; });
    use(begin, panel);
  }
}

at::Tensor with_contiguous_rows(const at::Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous();
}

using Multiply = decltype(&kernels::multiply);

at::Tensor run(Multiply multiply, const kernels::Matrix& w, const at::Tensor& x, int64_t width,
               at::ScalarType type, const Terms& terms, bool exact = false) {
  const auto rows = with_contiguous_rows(x);
  const bool onto = terms.onto.defined();
  auto y = onto ? terms.onto.reshape({x.size(0), width}).contiguous()
                : empty_result({x.size(0), width}, x.options().dtype(type));
  kernels::GemmOptions options{.add = onto, .exact = exact, .threads = torch_threads()};
  at::Tensor bias, left;
  if (terms.bias) {
    bias = terms.bias->to(at::kFloat).contiguous();
    options.bias = bias.const_data_ptr<float>();
  }
  if (terms.left.defined()) {
    left = with_contiguous_rows(terms.left);
    options.low_rank = {.left = left.const_data_ptr<float>(),
                        .left_stride = left.stride(0),
                        .right = terms.right.const_data_ptr<float>(),
                        .right_rank_stride = terms.right.stride(0),
                        .right_column_stride = terms.right.stride(1),
                        .rank = left.size(1),
                        .scale = static_cast<float>(terms.scale)};
  }
  multiply(w, {rows.const_data_ptr(), float_type(x.scalar_type()), rows.stride(0)}, x.size(0),
           {y.mutable_data_ptr(), float_type(type), width}, options);
  return y;
}

// Calls product(w, terms) with the gain as a part of the matrix.
template <class Product>
at::Tensor with_gain(const kernels::Matrix& w, const Terms& terms, Along along,
                     const Product& product) {
  if (!terms.gain.defined()) return product(w);
  const auto gain = terms.gain.detach().to(at::kFloat).contiguous();
  return product(kernels::ScaledMatrix(w, gain.const_data_ptr<float>(), along));
}

at::Tensor with_last(const at::Tensor& flat, const at::Tensor& like, int64_t last) {
  auto shape = like.sizes().vec();
  shape.back() = last;
  return flat.view(shape);
}

}  // namespace

bool has_gemm(const at::Tensor& x, const Terms& terms) {
  const auto fits = [](const at::Tensor& t) {
    return !t.defined() || (t.is_cpu() && t.scalar_type() == at::kFloat);
  };
  return kernels_take(x) && fits(terms.left) && fits(terms.right);
}

kernels::DenseMatrix plain_matrix(const at::Tensor& m) {
  return {m.const_data_ptr(), float_type(m.scalar_type()), m.size(0), m.size(1), m.stride(0)};
}

at::Tensor panel_linear(const kernels::Matrix& w, const at::Tensor& x, const Terms& terms,
                        Along gain) {
  require_cpu("linear", x);
  const auto flat = x.detach().reshape({-1, w.cols()});
  at::Tensor y;
  if (has_gemm(x, terms)) {
    y = with_gain(w, terms, gain, [&](const kernels::Matrix& scaled) {
      return run(kernels::multiply_transposed, scaled, flat, w.rows(), x.scalar_type(), terms);
    });
  } else {
    const auto wide = flat.to(at::kDouble);
    y = at::empty({flat.size(0), w.rows()}, wide.options());
    for_panels(w, [&](int64_t begin, const at::Tensor& panel) {
      auto columns = y.narrow(1, begin, panel.size(0));
      at::mm_out(columns, wide, panel.t());
    });
    y = times_gain(y, terms);
    add_terms(y, terms);
  }
  return with_last(y.to(x.scalar_type()), x, w.rows());
}

at::Tensor panel_backward_input(const kernels::Matrix& w, const at::Tensor& x, const Terms& terms,
                                Along gain) {
  require_cpu("linear_backward_input", x);
  const auto flat = x.detach().reshape({-1, w.rows()});
  at::Tensor y;
  if (has_gemm(x, terms)) {
    y = with_gain(w, terms, gain, [&](const kernels::Matrix& scaled) {
      return run(kernels::multiply, scaled, flat, w.cols(), x.scalar_type(), terms);
    });
  } else {
    const auto wide = times_gain(flat.to(at::kDouble), terms);
    y = at::zeros({flat.size(0), w.cols()}, wide.options());
    for_panels(w, [&](int64_t begin, const at::Tensor& panel) {
      y.addmm_(wide.narrow(1, begin, panel.size(0)), panel);
    });
    add_terms(y, terms);
  }
  return with_last(y.to(x.scalar_type()), x, w.cols());
}

at::Tensor times_plain_transposed(const at::Tensor& x, const at::Tensor& m) {
  const auto rows = with_contiguous_rows(m);
  return run(kernels::multiply_transposed, plain_matrix(rows), x, m.size(0), at::kFloat, {}, true);
}

at::Tensor times_plain(const at::Tensor& x, const at::Tensor& m) {
  const auto rows = with_contiguous_rows(m);
  return run(kernels::multiply, plain_matrix(rows), x, m.size(1), at::kFloat, {}, true);
}

at::Tensor panel_rows(const kernels::Matrix& w, int64_t begin, int64_t end, at::ScalarType dtype) {
  auto result = empty_result({end - begin, w.cols()}, at::TensorOptions().dtype(dtype));
  decode_into(w, result, end - begin, [begin](int64_t r) { return begin + r; });
  return result;
}

at::Tensor panel_gather(const kernels::Matrix& w, const at::Tensor& ids, at::ScalarType dtype) {
  const auto flat = ids.to(at::kLong).contiguous();
  const int64_t* id = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < flat.numel(); ++i)
    if (id[i] < 0 || id[i] >= w.rows())
      throw Error("gather", fmt::format("row {} of a table with {} rows", id[i], w.rows()));
  auto result = empty_result({flat.numel(), w.cols()}, at::TensorOptions().dtype(dtype));
  decode_into(w, result, flat.numel(), [id](int64_t i) { return id[i]; });
  auto shape = ids.sizes().vec();
  shape.push_back(w.cols());
  return result.view(shape);
}

}  // namespace budwood::quant
