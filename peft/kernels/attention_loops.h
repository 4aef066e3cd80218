#pragma once

#include <budwood/peft/kernels/attention_paths.h>
#include <budwood/peft/kernels/product_loops.h>

#include <cmath>
#include <initializer_list>

/// The text of the inner loops of attention.h. Scores lie transposed, [key][query], so that a
/// vector holds queries and no maximum or sum goes across its lanes.
namespace budwood::kernels {
namespace {

constexpr int64_t kGroups = kQueryBlock / kLanes;

struct Range {
  int64_t begin, end;
};

inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

/// The keys that some query of the block sees: those of the prefix, and the others.
struct SeenKeys {
  Range prefix, others;
};
inline SeenKeys seen_keys(const QueryBlock& b) {
  const int64_t end = b.causal ? most(0, least(b.keys, b.position + b.queries)) : b.keys;
  const int64_t begin = b.window > 0 ? most(0, b.position - b.window + 1) : 0;
  const int64_t prefix = least(b.prefix, b.keys);
  if (begin <= prefix) return {{0, 0}, {0, most(end, prefix)}};
  return {{0, prefix}, {begin, most(begin, end)}};
}

/// use(range) for each stretch of at most kKeyBlock keys.
template <class Use>
inline void for_key_blocks(const QueryBlock& b, const Use& use) {
  const SeenKeys seen = seen_keys(b);
  for (const Range range : {seen.prefix, seen.others})
    for (int64_t j = range.begin; j < range.end; j += kKeyBlock)
      use(Range{j, least(range.end, j + kKeyBlock)});
}

/// Whether some query of the block does not see some of these keys.
inline bool needs_mask(const QueryBlock& b, Range keys) {
  if (keys.end <= b.prefix) return false;
  return (b.causal && keys.end - 1 > b.position) ||
         (b.window > 0 && keys.begin <= b.position + b.queries - 1 - b.window);
}

/// x where the queries at `positions` see key j, else `other`.
inline Floats masked(const QueryBlock& b, int64_t j, Ints positions, Floats x, float other) {
  if (j < b.prefix) return x;
  const auto key = static_cast<int32_t>(j);
  if (b.causal) x = positions >= key ? x : all(other);
  if (b.window > 0) x = positions < key + static_cast<int32_t>(b.window) ? x : all(other);
  return x;
}

inline Ints positions_of(const QueryBlock& b, int64_t group) {
  return counting() + static_cast<int32_t>(b.position + group * kLanes);
}

/// to[i][query] = rows[query][i] * scale, zeros for the queries that are missing.
void transpose(const ConstSpan& rows, int64_t queries, int64_t d, float scale, float* to) {
  for (int64_t i = 0; i < d; i += 16)
    for (int64_t q = 0; q < kQueryBlock; ++q) {
      const float* from = rows.data + q * rows.stride + i;
      float* column = to + i * kQueryBlock + q;
      for (int64_t l = 0; l < 16; ++l)
        column[l * kQueryBlock] = q < queries ? from[l] * scale : 0.0f;
    }
}

inline ConstSpan rows_from(const ConstSpan& rows, int64_t first) {
  return {rows.data + first * rows.stride, rows.stride};
}

/// What has been seen of a group's scores.
struct Softmax {
  Floats largest = all(-kInfinity), sum = {};

  /// Replaces a group's scores by their exponentials; returns what earlier sums are multiplied by.
  Floats take(const QueryBlock& b, Range keys, int64_t group, float* scores) {
    const bool mask = needs_mask(b, keys);
    const Ints positions = positions_of(b, group);
    Floats now = largest;
    for (int64_t j = keys.begin; j < keys.end; ++j, scores += kQueryBlock) {
      Floats x = load(scores);
      if (mask) {
        x = masked(b, j, positions, x, -kInfinity);
        store(scores, x);
      }
      now = larger(now, x);
    }
    const Floats shift = now == -kInfinity ? all(0.0f) : now;
    const Floats shrink = exp(largest - shift);
    sum *= shrink;
    scores -= (keys.end - keys.begin) * kQueryBlock;
    for (int64_t j = keys.begin; j < keys.end; ++j, scores += kQueryBlock) {
      const Floats e = exp(load(scores) - shift);
      sum += e;
      store(scores, e);
    }
    largest = now;
    return shrink;
  }
};

void scale_row(float* row, float by, int64_t d) {
  for (int64_t i = 0; i < d; i += kLanes) store(row + i, load(row + i) * by);
}

void attend(const QueryBlock& b, const Span& out, float* lse, float* scratch) {
  float *queries = scratch, *scores = scratch + b.d * kQueryBlock;
  transpose(b.q, b.queries, b.d, b.scale, queries);
  Softmax softmax[kGroups];
  bool first = true;
  for_key_blocks(b, [&](Range keys) {
    const int64_t n = keys.end - keys.begin;
    const ConstSpan k = rows_from(b.k, keys.begin), v = rows_from(b.v, keys.begin);
    product(n, kQueryBlock, b.d, {k.data, k.stride, 1}, {queries, kQueryBlock}, scores, kQueryBlock,
            false);
    float shrink[kQueryBlock];
    for (int64_t g = 0; g < kGroups; ++g)
      store(shrink + g * kLanes, softmax[g].take(b, keys, g, scores + g * kLanes));
    if (!first)
      for (int64_t i = 0; i < b.queries; ++i) scale_row(out.data + i * out.stride, shrink[i], b.d);
    product(b.queries, b.d, n, {scores, 1, kQueryBlock}, {v.data, v.stride}, out.data, out.stride,
            !first);
    first = false;
  });
  for (int64_t i = 0; i < b.queries; ++i) {
    const Softmax& s = softmax[i / kLanes];
    const float sum = s.sum[i % kLanes];
    float* row = out.data + i * out.stride;
    if (sum == 0.0f) {
      for (int64_t c = 0; c < b.d; ++c) row[c] = 0.0f;
    } else {
      scale_row(row, 1.0f / sum, b.d);
    }
    if (lse != nullptr) lse[i] = s.largest[i % kLanes] + std::log(sum);
  }
}

inline float dot(const float* a, const float* b, int64_t d) {
  Floats total = {};
  for (int64_t i = 0; i < d; i += kLanes) total += load(a + i) * load(b + i);
  return sum(total);
}

void attend_backward(const QueryBlock& b, const ConstSpan& dout, const ConstSpan& out,
                     const float* lse, const Span& dq, const Span& dk, const Span& dv,
                     float* scratch) {
  float *queries = scratch, *grads = queries + b.d * kQueryBlock;
  float *weights = grads + b.d * kQueryBlock, *slopes = weights + kKeyBlock * kQueryBlock;
  transpose(b.q, b.queries, b.d, b.scale, queries);
  transpose(dout, b.queries, b.d, 1.0f, grads);
  float pull[kQueryBlock] = {}, norm[kQueryBlock] = {};
  for (int64_t i = 0; i < b.queries; ++i) {
    pull[i] = dot(dout.data + i * dout.stride, out.data + i * out.stride, b.d);
    norm[i] = lse[i];
  }
  bool first = true;
  for_key_blocks(b, [&](Range keys) {
    const int64_t n = keys.end - keys.begin;
    const ConstSpan k = rows_from(b.k, keys.begin), v = rows_from(b.v, keys.begin);
    product(n, kQueryBlock, b.d, {k.data, k.stride, 1}, {queries, kQueryBlock}, weights,
            kQueryBlock, false);
    product(n, kQueryBlock, b.d, {v.data, v.stride, 1}, {grads, kQueryBlock}, slopes, kQueryBlock,
            false);
    const bool mask = needs_mask(b, keys);
    for (int64_t g = 0; g < kGroups; ++g) {
      const Floats l = load(norm + g * kLanes), p = load(pull + g * kLanes);
      const Ints positions = positions_of(b, g);
      float *w = weights + g * kLanes, *s = slopes + g * kLanes;
      for (int64_t j = keys.begin; j < keys.end; ++j, w += kQueryBlock, s += kQueryBlock) {
        Floats weight = exp(load(w) - l);
        if (mask) weight = masked(b, j, positions, weight, 0.0f);
        store(w, weight);
        store(s, weight * (load(s) - p) * b.scale);
      }
    }
    product(n, b.d, b.queries, {slopes, kQueryBlock, 1}, {b.q.data, b.q.stride},
            dk.data + keys.begin * dk.stride, dk.stride, true);
    product(n, b.d, b.queries, {weights, kQueryBlock, 1}, {dout.data, dout.stride},
            dv.data + keys.begin * dv.stride, dv.stride, true);
    product(b.queries, b.d, n, {slopes, 1, kQueryBlock}, {k.data, k.stride}, dq.data, dq.stride,
            !first);
    first = false;
  });
  if (first)
    for (int64_t i = 0; i < b.queries; ++i)
      for (int64_t c = 0; c < b.d; ++c) dq.data[i * dq.stride + c] = 0.0f;
}

void decode(const QueryBlock& b, int64_t heads, const Span& out, float* lse, int64_t lse_stride,
            float* scratch) {
  const SeenKeys seen = seen_keys(b);
  float top[kQueryBlock], total[kQueryBlock];
  for (int64_t h = 0; h < heads; ++h) {
    top[h] = -kInfinity;
    total[h] = 0.0f;
    for (int64_t c = 0; c < b.d; ++c) out.data[h * out.stride + c] = 0.0f;
  }
  for (const Range range : {seen.prefix, seen.others})
    for (int64_t j = range.begin; j < range.end; ++j)
      for (int64_t h = 0; h < heads; ++h) {
        const float x = dot(b.q.data + h * b.q.stride, b.k.data + j * b.k.stride, b.d) * b.scale;
        scratch[h * b.keys + j] = x;
        top[h] = x > top[h] ? x : top[h];
      }
  for (const Range range : {seen.prefix, seen.others})
    for (int64_t h = 0; h < heads; ++h) {
      const float shift = top[h] == -kInfinity ? 0.0f : top[h];
      float* x = scratch + h * b.keys;
      for (int64_t j = range.begin; j < range.end; j += kLanes) {
        const int64_t n = least(kLanes, range.end - j);
        const Floats e = exp(load_first(x + j, n) - shift);
        store_first(x + j, e, n);
        for (int64_t i = 0; i < n; ++i) total[h] += e[i];
      }
    }
  for (const Range range : {seen.prefix, seen.others})
    product(heads, b.d, range.end - range.begin, {scratch + range.begin, b.keys, 1},
            {b.v.data + range.begin * b.v.stride, b.v.stride}, out.data, out.stride, true);
  for (int64_t h = 0; h < heads; ++h) {
    if (total[h] != 0.0f) scale_row(out.data + h * out.stride, 1.0f / total[h], b.d);
    if (lse != nullptr) lse[h * lse_stride] = top[h] + std::log(total[h]);
  }
}

void add_floats(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + load(from + i));
  for (; i < n; ++i) to[i] += from[i];
}

constexpr AttentionPath kAttentionPath = {attend, attend_backward, decode, add_floats};

}  // namespace
}  // namespace budwood::kernels
