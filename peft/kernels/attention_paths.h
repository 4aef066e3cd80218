#pragma once

#include <cstdint>

/// The inner loops of attention.h, over fp32 heads of d elements, d a multiple of 16.
namespace budwood::kernels {

/// Queries of a block, and keys that it meets at a time.
constexpr int64_t kQueryBlock = 32;
constexpr int64_t kKeyBlock = 256;

/// Rows of floats.
struct ConstSpan {
  const float* data = nullptr;
  int64_t stride = 0;
};
struct Span {
  float* data = nullptr;
  int64_t stride = 0;
};

/// Up to kQueryBlock queries of one head and the keys of their sequence.
struct QueryBlock {
  int64_t d = 0, queries = 0, keys = 0;
  int64_t position = 0;  ///< of the first query among the keys; below 0 where there are fewer keys
  float scale = 1.0f;
  bool causal = true;
  int64_t window = 0, prefix = 0;
  ConstSpan q, k, v;
};

/// Floats of scratch that forward and backward need for heads of d.
constexpr int64_t attention_scratch(int64_t d) {
  return (3 * d + 2 * kKeyBlock) * kQueryBlock;
}

struct AttentionPath {
  void (*forward)(const QueryBlock& block, const Span& out, float* lse, float* scratch);
  /// dk and dv are added to, dq is replaced.
  void (*backward)(const QueryBlock& block, const ConstSpan& dout, const ConstSpan& out,
                   const float* lse, const Span& dq, const Span& dk, const Span& dv,
                   float* scratch);
  /// One query of each of `heads` heads, rows of q, that share their keys; scratch holds
  /// heads * keys floats.
  void (*decode)(const QueryBlock& block, int64_t heads, const Span& out, float* lse,
                 int64_t lse_stride, float* scratch);
  /// to += from, n floats.
  void (*add)(const float* from, int64_t n, float* to);
};

extern const AttentionPath kAttentionScalar;
extern const AttentionPath kAttentionAvx2;
extern const AttentionPath kAttentionAvx512;

}  // namespace budwood::kernels
