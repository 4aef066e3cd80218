#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <budwood/quant/error.h>
#include <budwood/quant/kernels/dot.h>
#include <budwood/quant/kernels/half.h>
#include <budwood/quant/panels.h>

namespace budwood::quant {
namespace {

// Decoded bytes per thread; a panel stays in the second cache until it has been multiplied.
constexpr int64_t kPanelBytes = 1 << 20;
// Elements that are worth handing to another thread.
constexpr int64_t kGrainElements = 1 << 14;
// Up to here a row is multiplied as soon as it is decoded.
constexpr int64_t kFewTokens = 8;

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

int64_t grain_rows(const PackedRows& w) {
  return std::max<int64_t>(1, kGrainElements / w.cols);
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
void decode_into(const PackedRows& w, at::Tensor& target, int64_t count, const RowOf& row_of) {
  const auto type = target.scalar_type();
  const int64_t stride = w.cols * target.element_size();
  auto* base = static_cast<char*>(target.mutable_data_ptr());
  at::parallel_for(0, count, grain_rows(w), [&](int64_t begin, int64_t end) {
    std::vector<float> row(type == at::kFloat ? 0 : static_cast<size_t>(w.cols));
    for (int64_t r = begin; r < end; ++r) {
      char* dst = base + r * stride;
      if (type == at::kFloat) {
        w.decode(row_of(r), reinterpret_cast<float*>(dst));
      } else {
        w.decode(row_of(r), row.data());
        convert_row(row.data(), w.cols, type, dst);
      }
    }
  });
}

// Calls use(first row, panel [count, cols]) for all rows.
template <class Use>
void for_panels(const PackedRows& w, at::ScalarType type, const Use& use) {
  const int64_t bytes = w.cols * static_cast<int64_t>(c10::elementSize(type));
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t step = std::min(w.rows, threads * std::max<int64_t>(1, kPanelBytes / bytes));
  auto buffer = at::empty({step, w.cols}, at::TensorOptions().dtype(type));
  for (int64_t begin = 0; begin < w.rows; begin += step) {
    const int64_t count = std::min(step, w.rows - begin);
    decode_into(w, buffer, count, [begin](int64_t r) { return begin + r; });
    use(begin, buffer.narrow(0, 0, count));
  }
}

void multiply_few(const PackedRows& w, const at::Tensor& x, at::Tensor& y) {
  const int64_t tokens = x.size(0);
  const auto input = x.to(at::kFloat).contiguous();
  auto result = y.scalar_type() == at::kFloat ? y : at::empty(y.sizes(), at::kFloat);
  const float* from = input.const_data_ptr<float>();
  float* to = result.mutable_data_ptr<float>();
  at::parallel_for(0, w.rows, grain_rows(w), [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(w.cols));
    for (int64_t r = begin; r < end; ++r) {
      w.decode(r, row.data());
      kernels::dot_rows(row.data(), from, w.cols, tokens, to + r, w.rows);
    }
  });
  if (!result.is_same(y)) y.copy_(result);
}

at::Tensor with_last(const at::Tensor& flat, const at::Tensor& like, int64_t last) {
  auto shape = like.sizes().vec();
  shape.back() = last;
  return flat.view(shape);
}

}  // namespace

at::Tensor panel_linear(const PackedRows& w, const at::Tensor& x) {
  require_cpu("linear", x);
  const auto flat = x.detach().reshape({-1, w.cols});
  auto y = at::empty({flat.size(0), w.rows}, x.options());
  if (flat.size(0) > 0 && flat.size(0) <= kFewTokens && x.scalar_type() != at::kDouble) {
    multiply_few(w, flat, y);
  } else if (flat.size(0) > 0) {
    for_panels(w, x.scalar_type(), [&](int64_t begin, const at::Tensor& panel) {
      auto columns = y.narrow(1, begin, panel.size(0));
      at::mm_out(columns, flat, panel.t());
    });
  }
  return with_last(y, x, w.rows);
}

at::Tensor panel_backward_input(const PackedRows& w, const at::Tensor& grad) {
  require_cpu("linear_backward_input", grad);
  const auto type = grad.scalar_type();
  const auto flat = grad.detach().reshape({-1, w.rows});
  const auto wide = type == at::kDouble ? at::kDouble : at::kFloat;
  auto sum = at::zeros({flat.size(0), w.cols}, grad.options().dtype(wide));
  if (flat.size(0) > 0) {
    for_panels(w, type, [&](int64_t begin, const at::Tensor& panel) {
      const auto columns = flat.narrow(1, begin, panel.size(0));
      if (type == wide)
        sum.addmm_(columns, panel);
      else
        sum.add_(columns.mm(panel));
    });
  }
  return with_last(sum.to(type), grad, w.cols);
}

at::Tensor panel_rows(const PackedRows& w, int64_t begin, int64_t end, at::ScalarType dtype) {
  auto result = at::empty({end - begin, w.cols}, at::TensorOptions().dtype(dtype));
  decode_into(w, result, end - begin, [begin](int64_t r) { return begin + r; });
  return result;
}

at::Tensor panel_gather(const PackedRows& w, const at::Tensor& ids, at::ScalarType dtype) {
  const auto flat = ids.to(at::kLong).contiguous();
  const int64_t* id = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < flat.numel(); ++i)
    if (id[i] < 0 || id[i] >= w.rows)
      throw Error("gather", fmt::format("row {} of a table with {} rows", id[i], w.rows));
  auto result = at::empty({flat.numel(), w.cols}, at::TensorOptions().dtype(dtype));
  decode_into(w, result, flat.numel(), [id](int64_t i) { return id[i]; });
  auto shape = ids.sizes().vec();
  shape.push_back(w.cols);
  return result.view(shape);
}

}  // namespace budwood::quant
