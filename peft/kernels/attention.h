#pragma once

#include <budwood/quant/kernels/gemm.h>

#include <cstdint>

/// Attention over sequences laid end to end (arXiv 1706.03762), without a matrix of scores in
/// memory: blocks of 32 queries meet blocks of 256 keys, and the backward computes the scores again
/// (arXiv 2205.14135). Arithmetic is fp32; results do not depend on the number of threads.
namespace budwood::kernels {

/// Which queries see which keys.
struct AttentionPlan {
  int64_t heads = 1, kv_heads = 1;  ///< heads / kv_heads query heads share a key head
  int64_t head_dim = 0;
  int64_t sequences = 0;
  /// Sequence s has queries [cu_q[s], cu_q[s + 1]) and keys [cu_k[s], cu_k[s + 1]). Its last query
  /// is aligned with its last key.
  const int64_t* cu_q = nullptr;
  const int64_t* cu_k = nullptr;
  float scale = 1.0f;  ///< of the scores
  bool causal = true;  ///< a query sees no key after its own position
  int64_t window = 0;  ///< keys a query sees, its own included; 0 = all. Needs causal
  int64_t prefix = 0;  ///< so many first keys of a sequence are seen by all its queries
};

/// x[token, head, i] lies at token * token_stride + head * head_stride + i elements.
struct HeadRows {
  const void* data = nullptr;
  quant::kernels::FloatType type = quant::kernels::FloatType::fp32;
  int64_t token_stride = 0, head_stride = 0;
};
struct MutableHeadRows {
  void* data = nullptr;
  quant::kernels::FloatType type = quant::kernels::FloatType::fp32;
  int64_t token_stride = 0, head_stride = 0;
};

/// out [tokens_q, heads, head_dim]; lse [heads, tokens_q] is the logsumexp of each query's scores,
/// or null. A query that sees no key gets zeros, and -infinity as lse.
void attention(const AttentionPlan& plan, const HeadRows& q, const HeadRows& k, const HeadRows& v,
               const MutableHeadRows& out, float* lse, const quant::kernels::Threads& threads);

/// Gradients from dout and what the forward read and wrote; dq, dk and dv are replaced.
void attention_backward(const AttentionPlan& plan, const HeadRows& dout, const HeadRows& q,
                        const HeadRows& k, const HeadRows& v, const HeadRows& out, const float* lse,
                        const MutableHeadRows& dq, const MutableHeadRows& dk,
                        const MutableHeadRows& dv, const quant::kernels::Threads& threads);

}  // namespace budwood::kernels
