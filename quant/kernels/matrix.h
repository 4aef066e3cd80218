#pragma once

#include <budwood/quant/kernels/affine.h>
#include <budwood/quant/kernels/bnb4.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <budwood/quant/kernels/half.h>

#include <algorithm>
#include <cstdint>

/// Stored matrices of any form, seen as fp32 pieces. What gemm.h multiplies with.
namespace budwood::quant::kernels {

class Matrix {
 public:
  Matrix(int64_t rows, int64_t cols, int64_t block = 1) : rows_(rows), cols_(cols), block_(block) {}
  virtual ~Matrix() = default;

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  /// Pieces begin at a multiple of this column, and end at one or at the end of the row.
  int64_t block() const { return block_; }

  /// Rows [row, row + rows) by columns [col, col + cols) to dst, rows `stride` floats apart. Called
  /// from several threads.
  virtual void decode(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
                      int64_t stride) const = 0;

  /// out[r] = sum over i of element (row + r, col + i) * x[i], for four rows, straight from the
  /// codes with the bits of decoding first. False, and nothing done, where a form cannot.
  virtual bool dot(int64_t row, int64_t col, int64_t cols, const float* x, float* out) const {
    (void)row, (void)col, (void)cols, (void)x, (void)out;
    return false;
  }

  /// The elements themselves when they lie as fp32 (as bf16) with contiguous rows; else null.
  virtual const float* floats() const { return nullptr; }
  virtual const uint16_t* bf16() const { return nullptr; }
  /// Elements between rows of those.
  virtual int64_t stride() const { return 0; }

 private:
  int64_t rows_, cols_, block_;
};

/// fp32, bf16 or fp16 with contiguous rows, `stride` elements apart.
class DenseMatrix final : public Matrix {
 public:
  DenseMatrix(const void* data, FloatType type, int64_t rows, int64_t cols, int64_t stride)
      : Matrix(rows, cols), data_(data), type_(type), stride_(stride) {}
  void decode(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
              int64_t stride) const override;
  const float* floats() const override {
    return type_ == FloatType::fp32 ? static_cast<const float*>(data_) : nullptr;
  }
  const uint16_t* bf16() const override {
    return type_ == FloatType::bf16 ? static_cast<const uint16_t*>(data_) : nullptr;
  }
  int64_t stride() const override { return stride_; }

 private:
  const void* data_;
  FloatType type_;
  int64_t stride_;
};

/// NF4 and FP4.
class Bnb4Matrix final : public Matrix {
 public:
  Bnb4Matrix(const Bnb4View& view, int64_t cols)
      : Matrix(view.count / std::max<int64_t>(1, cols), cols), view_(view) {}
  void decode(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
              int64_t stride) const override {
    dequantize_bnb4_tile(view_, Matrix::cols(), row, rows, col, cols, dst, stride);
  }
  bool dot(int64_t row, int64_t col, int64_t cols, const float* x, float* out) const override {
    return dot_bnb4(view_, Matrix::cols(), row, col, cols, x, out);
  }

 private:
  Bnb4View view_;
};

/// Blocks of GGUF files, row after row.
class GgufMatrix final : public Matrix {
 public:
  GgufMatrix(GgmlType type, const void* blocks, int64_t rows, int64_t cols)
      : Matrix(rows, cols, ggml_type_traits(type).block), type_(type), blocks_(blocks) {}
  void decode(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
              int64_t stride) const override;

 private:
  GgmlType type_;
  const void* blocks_;
};

/// Group-affine integers.
class AffineMatrix final : public Matrix {
 public:
  explicit AffineMatrix(const AffineView& view) : Matrix(view.rows, view.cols), view_(view) {}
  void decode(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
              int64_t stride) const override {
    dequantize_affine_tile(view_, row, rows, col, cols, dst, stride);
  }

 private:
  AffineView view_;
};

/// LLM.int8: codes [rows, cols] and the largest magnitude of each row.
class Int8Matrix final : public Matrix {
 public:
  Int8Matrix(const int8_t* codes, const float* scales, int64_t rows, int64_t cols)
      : Matrix(rows, cols), codes_(codes), scales_(scales) {}
  void decode(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
              int64_t stride) const override;

 private:
  const int8_t* codes_;
  const float* scales_;
};

/// Another matrix with each row, or each column, times a number of its own. That matrix and the
/// factors must live as long.
class ScaledMatrix final : public Matrix {
 public:
  enum class Along { rows, cols };
  ScaledMatrix(const Matrix& inner, const float* factors, Along along)
      : Matrix(inner.rows(), inner.cols(), inner.block()),
        inner_(inner),
        factors_(factors),
        along_(along) {}
  void decode(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
              int64_t stride) const override;
  bool dot(int64_t row, int64_t col, int64_t cols, const float* x, float* out) const override;

 private:
  const Matrix& inner_;
  const float* factors_;
  Along along_;
};

}  // namespace budwood::quant::kernels
