#include <budwood/peft/kernels/attention.h>
#include <budwood/peft/kernels/attention_paths.h>
#include <budwood/peft/kernels/scratch.h>
#include <budwood/quant/kernels/isa.h>

#include <algorithm>
#include <vector>

namespace budwood::kernels {
namespace {

using quant::kernels::FloatType;
using quant::kernels::Threads;
using quant::kernels::gemm::ceil_div;
using quant::kernels::gemm::hand_out;
using quant::kernels::gemm::round_up;

// Queries of a forward task, and tokens of a task that converts.
constexpr int64_t kTaskQueries = 4 * kQueryBlock;
constexpr int64_t kTaskTokens = 64;
// With fewer sequences and key heads than this the backward's tasks are query heads.
constexpr int64_t kFewTasks = 8;

const AttentionPath& path() {
  return quant::kernels::active_path(kAttentionScalar, kAttentionAvx2, kAttentionAvx512);
}

// Heads of floats, padded to a multiple of 16.
template <class Float>
struct Heads {
  Float* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;
  Float* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

template <class Rows>
bool usable_as_is(const Rows& rows, int64_t d) {
  return rows.type == FloatType::fp32 && d % 16 == 0;
}

// Memory of the calling thread for heads that are not stored as the loops want them.
class Buffers {
 public:
  // Announces heads; get() returns them in the order of announcement.
  void need(bool used, int64_t tokens, int64_t heads, int64_t width) {
    sizes_[count_++] = used ? tokens * heads * width : 0;
  }
  void allocate() {
    thread_local quant::kernels::gemm::Workspace space;
    int64_t total = 0;
    for (int i = 0; i < count_; ++i) total += round_up(sizes_[i], 16);
    next_ = space.floats(total);
    count_ = 0;
  }
  float* get() {
    float* at = next_;
    next_ += round_up(sizes_[count_++], 16);
    return at;
  }

 private:
  int64_t sizes_[8] = {};
  int count_ = 0;
  float* next_ = nullptr;
};

template <class Body>
void for_tokens(int64_t tokens, int64_t width, const Threads& threads, const Body& body) {
  hand_out(threads, ceil_div(tokens, kTaskTokens), tokens * width, [&] {
    return [&](int64_t task) {
      const int64_t end = std::min(tokens, (task + 1) * kTaskTokens);
      for (int64_t token = task * kTaskTokens; token < end; ++token) body(token);
    };
  });
}

template <class Rows>
char* address(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<char*>(const_cast<void*>(rows.data)) +
         (token * rows.token_stride + head * rows.head_stride) * float_bytes(rows.type);
}

Heads<const float> as_floats(const HeadRows& rows, int64_t tokens, int64_t heads, int64_t d,
                             float* buffer, const Threads& threads) {
  if (usable_as_is(rows, d))
    return {static_cast<const float*>(rows.data), rows.token_stride, rows.head_stride};
  const int64_t width = round_up(d, 16);
  for_tokens(tokens, heads * width, threads, [&](int64_t token) {
    for (int64_t h = 0; h < heads; ++h) {
      float* to = buffer + (token * heads + h) * width;
      to_fp32(rows.type, address(rows, token, h), to, d);
      std::fill(to + d, to + width, 0.0f);
    }
  });
  return {buffer, heads * width, width};
}

Heads<float> target_of(const MutableHeadRows& rows, int64_t heads, int64_t d, float* buffer) {
  if (usable_as_is(rows, d))
    return {static_cast<float*>(rows.data), rows.token_stride, rows.head_stride};
  const int64_t width = round_up(d, 16);
  return {buffer, heads * width, width};
}

void store(const Heads<float>& from, const MutableHeadRows& rows, int64_t tokens, int64_t heads,
           int64_t d, const Threads& threads) {
  if (from.data == rows.data) return;
  for_tokens(tokens, heads * d, threads, [&](int64_t token) {
    for (int64_t h = 0; h < heads; ++h)
      fp32_to(rows.type, from.at(token, h), address(rows, token, h), d);
  });
}

int64_t tokens_q(const AttentionPlan& plan) {
  return plan.sequences == 0 ? 0 : plan.cu_q[plan.sequences];
}
int64_t tokens_k(const AttentionPlan& plan) {
  return plan.sequences == 0 ? 0 : plan.cu_k[plan.sequences];
}

int64_t work_of(const AttentionPlan& plan) {
  int64_t scores = 0;
  for (int64_t s = 0; s < plan.sequences; ++s)
    scores += (plan.cu_q[s + 1] - plan.cu_q[s]) * (plan.cu_k[s + 1] - plan.cu_k[s]);
  return scores * plan.heads * plan.head_dim;
}

// The queries [begin, end) of a sequence for one head.
QueryBlock block_of(const AttentionPlan& plan, int64_t sequence, int64_t begin, int64_t end,
                    int64_t head, const Heads<const float>& q, const Heads<const float>& k,
                    const Heads<const float>& v) {
  const int64_t q0 = plan.cu_q[sequence], k0 = plan.cu_k[sequence];
  const int64_t keys = plan.cu_k[sequence + 1] - k0;
  const int64_t kv_head = head / (plan.heads / plan.kv_heads);
  return {.d = round_up(plan.head_dim, 16),
          .queries = end - begin,
          .keys = keys,
          .position = keys - (plan.cu_q[sequence + 1] - q0) + begin,
          .scale = plan.scale,
          .causal = plan.causal,
          .window = plan.window,
          .prefix = plan.prefix,
          .q = {q.at(q0 + begin, head), q.token_stride},
          .k = {k.at(k0, kv_head), k.token_stride},
          .v = {v.at(k0, kv_head), v.token_stride}};
}

struct Task {
  int64_t sequence, head, begin, end;
};

// One query of each sequence: a task is a key head with all its query heads.
void decode_all(const AttentionPlan& plan, const Heads<const float>& q, const Heads<const float>& k,
                const Heads<const float>& v, const Heads<float>& out, float* lse,
                const Threads& threads) {
  const int64_t group = plan.heads / plan.kv_heads;
  hand_out(threads, plan.sequences * plan.kv_heads, work_of(plan) * 4, [&] {
    return [&](int64_t task) {
      const int64_t s = task / plan.kv_heads, head = task % plan.kv_heads * group;
      const int64_t token = plan.cu_q[s];
      if (plan.cu_q[s + 1] == token) return;
      QueryBlock block = block_of(plan, s, 0, 1, head, q, k, v);
      block.q.stride = q.head_stride;
      float* scores = scratch().floats(group * std::max<int64_t>(1, block.keys) + 16);
      path().decode(block, group, {out.at(token, head), out.head_stride},
                    lse ? lse + head * tokens_q(plan) + token : nullptr, tokens_q(plan), scores);
    };
  });
}

bool one_query_each(const AttentionPlan& plan) {
  for (int64_t s = 0; s < plan.sequences; ++s)
    if (plan.cu_q[s + 1] - plan.cu_q[s] > 1) return false;
  return plan.heads / plan.kv_heads <= kQueryBlock;
}

}  // namespace

void attention(const AttentionPlan& plan, const HeadRows& q, const HeadRows& k, const HeadRows& v,
               const MutableHeadRows& out, float* lse, const Threads& threads) {
  const int64_t d = plan.head_dim, width = round_up(d, 16);
  const int64_t queries = tokens_q(plan), keys = tokens_k(plan);
  Buffers buffers;
  buffers.need(!usable_as_is(q, d), queries, plan.heads, width);
  buffers.need(!usable_as_is(k, d), keys, plan.kv_heads, width);
  buffers.need(!usable_as_is(v, d), keys, plan.kv_heads, width);
  buffers.need(!usable_as_is(out, d), queries, plan.heads, width);
  buffers.allocate();
  const auto fq = as_floats(q, queries, plan.heads, d, buffers.get(), threads);
  const auto fk = as_floats(k, keys, plan.kv_heads, d, buffers.get(), threads);
  const auto fv = as_floats(v, keys, plan.kv_heads, d, buffers.get(), threads);
  const auto to = target_of(out, plan.heads, d, buffers.get());
  if (one_query_each(plan)) {
    decode_all(plan, fq, fk, fv, to, lse, threads);
  } else {
    std::vector<Task> tasks;
    for (int64_t s = 0; s < plan.sequences; ++s)
      for (int64_t h = 0; h < plan.heads; ++h)
        for (int64_t n = plan.cu_q[s + 1] - plan.cu_q[s], begin = 0; begin < n;
             begin += kTaskQueries)
          tasks.push_back({s, h, begin, std::min(n, begin + kTaskQueries)});
    hand_out(threads, static_cast<int64_t>(tasks.size()), work_of(plan), [&] {
      float* space = scratch().floats(attention_scratch(width));
      return [&, space](int64_t i) {
        const Task& task = tasks[static_cast<size_t>(i)];
        for (int64_t at = task.begin; at < task.end; at += kQueryBlock) {
          const int64_t end = std::min(task.end, at + kQueryBlock);
          const int64_t token = plan.cu_q[task.sequence] + at;
          path().forward(block_of(plan, task.sequence, at, end, task.head, fq, fk, fv),
                         {to.at(token, task.head), to.token_stride},
                         lse ? lse + task.head * queries + token : nullptr, space);
        }
      };
    });
  }
  store(to, out, queries, plan.heads, d, threads);
}

void attention_backward(const AttentionPlan& plan, const HeadRows& dout, const HeadRows& q,
                        const HeadRows& k, const HeadRows& v, const HeadRows& out, const float* lse,
                        const MutableHeadRows& dq, const MutableHeadRows& dk,
                        const MutableHeadRows& dv, const Threads& threads) {
  const int64_t d = plan.head_dim, width = round_up(d, 16), heads = plan.heads;
  const int64_t queries = tokens_q(plan), keys = tokens_k(plan);
  const int64_t group = heads / plan.kv_heads;
  // Depends on shapes alone, so that sums have one order.
  const bool by_head = group > 1 && plan.sequences * plan.kv_heads < kFewTasks;
  const int64_t key_heads = by_head ? heads : plan.kv_heads;
  const bool own_k = by_head || !usable_as_is(dk, d), own_v = by_head || !usable_as_is(dv, d);
  Buffers buffers;
  buffers.need(!usable_as_is(dout, d), queries, heads, width);
  buffers.need(!usable_as_is(q, d), queries, heads, width);
  buffers.need(!usable_as_is(k, d), keys, plan.kv_heads, width);
  buffers.need(!usable_as_is(v, d), keys, plan.kv_heads, width);
  buffers.need(!usable_as_is(out, d), queries, heads, width);
  buffers.need(!usable_as_is(dq, d), queries, heads, width);
  buffers.need(own_k, keys, key_heads, width);
  buffers.need(own_v, keys, key_heads, width);
  buffers.allocate();
  const auto fdout = as_floats(dout, queries, heads, d, buffers.get(), threads);
  const auto fq = as_floats(q, queries, heads, d, buffers.get(), threads);
  const auto fk = as_floats(k, keys, plan.kv_heads, d, buffers.get(), threads);
  const auto fv = as_floats(v, keys, plan.kv_heads, d, buffers.get(), threads);
  const auto fout = as_floats(out, queries, heads, d, buffers.get(), threads);
  const auto to_q = target_of(dq, heads, d, buffers.get());
  float *k_buffer = buffers.get(), *v_buffer = buffers.get();
  const Heads<float> sums{k_buffer, key_heads * width, width};
  const auto to_k = own_k ? sums : target_of(dk, plan.kv_heads, d, nullptr);
  const auto to_v = own_v ? Heads<float>{v_buffer, sums.token_stride, sums.head_stride}
                          : target_of(dv, plan.kv_heads, d, nullptr);

  const AttentionPath& loops = path();
  hand_out(threads, plan.sequences * key_heads, 3 * work_of(plan), [&] {
    float* space = scratch().floats(attention_scratch(width));
    return [&, space](int64_t task) {
      const int64_t s = task / key_heads, key_head = task % key_heads;
      for (int64_t token = plan.cu_k[s]; token < plan.cu_k[s + 1]; ++token) {
        std::fill_n(to_k.at(token, key_head), width, 0.0f);
        std::fill_n(to_v.at(token, key_head), width, 0.0f);
      }
      const int64_t first = by_head ? key_head : key_head * group;
      const int64_t n = plan.cu_q[s + 1] - plan.cu_q[s], q0 = plan.cu_q[s];
      for (int64_t head = first; head < first + (by_head ? 1 : group); ++head)
        for (int64_t at = 0; at < n; at += kQueryBlock)
          loops.backward(block_of(plan, s, at, std::min(n, at + kQueryBlock), head, fq, fk, fv),
                         {fdout.at(q0 + at, head), fdout.token_stride},
                         {fout.at(q0 + at, head), fout.token_stride},
                         lse + head * queries + q0 + at,
                         {to_q.at(q0 + at, head), to_q.token_stride},
                         {to_k.at(plan.cu_k[s], key_head), to_k.token_stride},
                         {to_v.at(plan.cu_k[s], key_head), to_v.token_stride}, space);
    };
  });
  if (by_head)
    for_tokens(keys, heads * width, threads, [&](int64_t token) {
      for (int64_t h = 0; h < heads; ++h)
        if (h % group != 0) {
          loops.add(to_k.at(token, h), width, to_k.at(token, h - h % group));
          loops.add(to_v.at(token, h), width, to_v.at(token, h - h % group));
        }
    });
  const int64_t step = by_head ? group : 1;
  store(to_q, dq, queries, heads, d, threads);
  store({to_k.data, to_k.token_stride, step * to_k.head_stride}, dk, keys, plan.kv_heads, d,
        threads);
  store({to_v.data, to_v.token_stride, step * to_v.head_stride}, dv, keys, plan.kv_heads, d,
        threads);
}

}  // namespace budwood::kernels
