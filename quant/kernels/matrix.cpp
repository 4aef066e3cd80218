#include <budwood/quant/kernels/int8.h>
#include <budwood/quant/kernels/matrix.h>

#include <cstring>

namespace budwood::quant::kernels {
namespace {

// Rows that are asked for before they are copied.
constexpr int64_t kAhead = 12;

}  // namespace

void DenseMatrix::decode(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
                         int64_t stride) const {
  const auto* src = static_cast<const char*>(data_) + (row * stride_ + col) * float_bytes(type_);
  const int64_t row_bytes = stride_ * float_bytes(type_);
  for (int64_t r = 0; r < rows; ++r, dst += stride, src += row_bytes) {
    // A piece of a row is short: no stream of addresses tells the processor what comes next.
    if (r + kAhead < rows) {
      for (int64_t i = 0; i < cols * float_bytes(type_); i += 64) {
        __builtin_prefetch(src + kAhead * row_bytes + i);
      }
    }
    to_fp32(type_, src, dst, cols);
  }
}

void GgufMatrix::decode(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
                        int64_t stride) const {
  const int64_t row_size =
      Matrix::cols() / block() * static_cast<int64_t>(ggml_type_traits(type_).block_bytes);
  const auto* src = static_cast<const char*>(blocks_) + row * row_size +
                    col / block() * static_cast<int64_t>(ggml_type_traits(type_).block_bytes);
  dequantize_rows(type_, src, row_size, rows, dst, stride, cols);
}

void Int8Matrix::decode(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
                        int64_t stride) const {
  for (int64_t r = row; r < row + rows; ++r, dst += stride) {
    dequantize_int8_row(codes_ + r * Matrix::cols() + col, scales_[r], cols, FloatType::fp32, dst);
  }
}

void ScaledMatrix::decode(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
                          int64_t stride) const {
  inner_.decode(row, rows, col, cols, dst, stride);
  for (int64_t r = 0; r < rows; ++r, dst += stride) {
    if (along_ == Along::rows) {
      const float factor = factors_[row + r];
      for (int64_t i = 0; i < cols; ++i) dst[i] *= factor;
    } else {
      for (int64_t i = 0; i < cols; ++i) dst[i] *= factors_[col + i];
    }
  }
}

bool ScaledMatrix::dot(int64_t row, int64_t col, int64_t cols, const float* x, float* out) const {
  constexpr int64_t kRows = 4;
  if (along_ != Along::rows || !inner_.dot(row, col, cols, x, out)) return false;
  for (int64_t r = 0; r < kRows; ++r) out[r] *= factors_[row + r];
  return true;
}

}  // namespace budwood::quant::kernels
