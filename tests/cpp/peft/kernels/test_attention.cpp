#include <budwood/peft/kernels/attention.h>
#include <budwood/quant/kernels/half.h>

#include <limits>

#include "kernel_cases.h"

using namespace budwood::kernels;
using namespace kernel_cases;
using budwood::quant::kernels::FloatType;

namespace {

struct Case {
  std::string name;
  int64_t heads, kv_heads, d;
  std::vector<int64_t> cu_q, cu_k;
  bool causal = true;
  int64_t window = 0, prefix = 0;
};

const std::vector<Case> kCases = {
    {"one sequence", 2, 2, 16, {0, 70}, {0, 70}},
    {"grouped, packed, empty and single", 6, 2, 64, {0, 33, 33, 34, 134}, {0, 33, 33, 34, 134}},
    {"long, several key blocks", 1, 1, 32, {0, 600}, {0, 600}},
    {"odd head size", 4, 2, 5, {0, 9, 50}, {0, 9, 50}},
    {"head size 1", 3, 1, 1, {0, 40}, {0, 40}},
    {"window", 2, 1, 16, {0, 300}, {0, 300}, true, 17},
    {"window and prefix", 4, 2, 16, {0, 30, 330}, {0, 40, 350}, true, 20, 10},
    {"prefix longer than a block of keys", 2, 1, 16, {0, 40}, {0, 340}, true, 8, 300},
    {"cached keys", 4, 2, 32, {0, 3, 43}, {0, 20, 90}},
    {"fewer keys than queries", 2, 1, 16, {0, 40}, {0, 30}},
    {"encoder", 2, 1, 48, {0, 37, 80}, {0, 37, 80}, false},
    {"decode", 6, 2, 64, {0, 1, 2}, {0, 77, 330}},
    {"decode with window and prefix", 6, 2, 20, {0, 1}, {0, 77}, true, 9, 4},
    {"decode without keys", 2, 1, 16, {0, 1, 2}, {0, 0, 3}},
    {"nothing", 2, 1, 16, {0, 0}, {0, 0}},
    {"many sequences",
     2,
     1,
     16,
     {0, 5, 9, 40, 41, 50, 60, 70, 75, 80},
     {0, 5, 9, 40, 41, 50, 60, 70, 75, 80}},
};

AttentionPlan plan_of(const Case& c) {
  return {c.heads,       c.kv_heads,    c.d,  static_cast<int64_t>(c.cu_q.size()) - 1,
          c.cu_q.data(), c.cu_k.data(), 0.3f, c.causal,
          c.window,      c.prefix};
}

struct Reference {
  std::vector<double> out, lse, dq, dk, dv;
};

// Every score, in float64.
Reference reference(const Case& c, const std::vector<float>& q, const std::vector<float>& k,
                    const std::vector<float>& v, const std::vector<float>& dout) {
  const auto nq = c.cu_q.back();
  Reference r;
  r.out.assign(q.size(), 0.0);
  r.dq.assign(q.size(), 0.0);
  r.dk.assign(k.size(), 0.0);
  r.dv.assign(v.size(), 0.0);
  r.lse.assign(static_cast<size_t>(c.heads * nq), 0.0);
  const auto d = static_cast<size_t>(c.d);
  for (size_t s = 0; s + 1 < c.cu_q.size(); ++s) {
    const int64_t tq = c.cu_q[s + 1] - c.cu_q[s], tk = c.cu_k[s + 1] - c.cu_k[s];
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < tq; ++i) {
        const auto qi = static_cast<size_t>((c.cu_q[s] + i) * c.heads + h) * d;
        const auto key = [&](int64_t j) {
          return static_cast<size_t>((c.cu_k[s] + j) * c.kv_heads + h / (c.heads / c.kv_heads)) * d;
        };
        const auto seen = [&](int64_t j) {
          const int64_t position = tk - tq + i;
          return j < c.prefix ||
                 ((!c.causal || j <= position) && (c.window == 0 || j > position - c.window));
        };
        std::vector<double> p(static_cast<size_t>(tk), 0.0);
        double sum = 0, delta = 0;
        for (int64_t j = 0; j < tk; ++j) {
          if (!seen(j)) continue;
          double x = 0;
          for (size_t e = 0; e < d; ++e) x += double{q[qi + e]} * double{k[key(j) + e]};
          p[static_cast<size_t>(j)] = std::exp(x * double{0.3f});
          sum += p[static_cast<size_t>(j)];
        }
        r.lse[static_cast<size_t>(h * nq + c.cu_q[s] + i)] = std::log(sum);
        if (sum == 0) continue;
        for (int64_t j = 0; j < tk; ++j) {
          p[static_cast<size_t>(j)] /= sum;
          for (size_t e = 0; e < d; ++e)
            r.out[qi + e] += p[static_cast<size_t>(j)] * double{v[key(j) + e]};
        }
        for (size_t e = 0; e < d; ++e) delta += r.out[qi + e] * double{dout[qi + e]};
        for (int64_t j = 0; j < tk; ++j) {
          const double w = p[static_cast<size_t>(j)];
          double dp = 0;
          for (size_t e = 0; e < d; ++e) dp += double{dout[qi + e]} * double{v[key(j) + e]};
          const double ds = w * (dp - delta) * double{0.3f};
          for (size_t e = 0; e < d; ++e) {
            r.dv[key(j) + e] += w * double{dout[qi + e]};
            r.dq[qi + e] += ds * double{k[key(j) + e]};
            r.dk[key(j) + e] += ds * double{q[qi + e]};
          }
        }
      }
  }
  return r;
}

struct Result {
  std::vector<float> out, lse, dq, dk, dv;
  bool operator==(const Result&) const = default;
};

HeadRows rows(const std::vector<float>& x, int64_t heads, int64_t d) {
  return {x.data(), FloatType::fp32, heads * d, d};
}
MutableHeadRows rows(std::vector<float>& x, int64_t heads, int64_t d) {
  return {x.data(), FloatType::fp32, heads * d, d};
}

Result run(const Case& c, const std::vector<float>& q, const std::vector<float>& k,
           const std::vector<float>& v, const std::vector<float>& dout, int threads = 1) {
  const float junk = 7.0f;
  Result r{std::vector<float>(q.size(), junk),
           std::vector<float>(static_cast<size_t>(c.heads * c.cu_q.back()), junk),
           std::vector<float>(q.size(), junk), std::vector<float>(k.size(), junk),
           std::vector<float>(v.size(), junk)};
  const auto plan = plan_of(c);
  attention(plan, rows(q, c.heads, c.d), rows(k, c.kv_heads, c.d), rows(v, c.kv_heads, c.d),
            rows(r.out, c.heads, c.d), r.lse.data(), threads_of(threads));
  attention_backward(plan, rows(dout, c.heads, c.d), rows(q, c.heads, c.d),
                     rows(k, c.kv_heads, c.d), rows(v, c.kv_heads, c.d),
                     rows(std::as_const(r.out), c.heads, c.d), r.lse.data(),
                     rows(r.dq, c.heads, c.d), rows(r.dk, c.kv_heads, c.d),
                     rows(r.dv, c.kv_heads, c.d), threads_of(threads));
  return r;
}

struct Inputs {
  std::vector<float> q, k, v, dout;
};
Inputs inputs_of(const Case& c) {
  const int64_t nq = c.cu_q.back() * c.heads * c.d, nk = c.cu_k.back() * c.kv_heads * c.d;
  return {normal_floats(nq, 1), normal_floats(nk, 2), normal_floats(nk, 3), normal_floats(nq, 4)};
}

}  // namespace

TEST_CASE("attention and its gradients equal the float64 formula") {
  for (const auto& c : kCases) {
    const auto in = inputs_of(c);
    const auto wanted = reference(c, in.q, in.k, in.v, in.dout);
    on_each_isa([&] {
      CAPTURE(c.name);
      const auto found = run(c, in.q, in.k, in.v, in.dout);
      CHECK(distance(found.out, wanted.out) < 3e-6);
      CHECK(distance(found.dq, wanted.dq) < 1e-5);
      CHECK(distance(found.dk, wanted.dk) < 1e-5);
      CHECK(distance(found.dv, wanted.dv) < 1e-5);
      for (size_t i = 0; i < found.lse.size(); ++i)
        if (std::isinf(wanted.lse[i]))
          CHECK(found.lse[i] == -std::numeric_limits<float>::infinity());
        else
          CHECK(found.lse[i] == doctest::Approx(wanted.lse[i]).epsilon(1e-5));
      CHECK(run(c, in.q, in.k, in.v, in.dout, 3) == found);
    });
  }
}

TEST_CASE("attention reads and writes 16-bit heads in slices of longer rows") {
  const Case c{"", 4, 2, 16, {0, 20, 50}, {0, 20, 50}};
  const int64_t tokens = 50, width = 8 * 16;
  // q, k and v side by side, as one projection writes them.
  auto packed = normal_floats(tokens * width, 5);
  std::vector<uint16_t> half(packed.size());
  budwood::quant::kernels::fp32_to_bf16(packed.data(), half.data(), tokens * width);
  budwood::quant::kernels::bf16_to_fp32(half.data(), packed.data(), tokens * width);
  const auto take = [&](int64_t first, int64_t heads) {
    std::vector<float> x;
    for (int64_t t = 0; t < tokens; ++t)
      x.insert(x.end(), packed.begin() + t * width + first * 16,
               packed.begin() + t * width + (first + heads) * 16);
    return x;
  };
  const auto q = take(0, 4), k = take(4, 2), v = take(6, 2), dout = take(0, 4);
  const auto wanted = run(c, q, k, v, dout);
  const auto at = [&](int64_t head) {
    return HeadRows{half.data() + head * 16, FloatType::bf16, width, 16};
  };
  std::vector<float> out(q.size()), lse(static_cast<size_t>(4 * tokens));
  attention(plan_of(c), at(0), at(4), at(6), rows(out, 4, 16), lse.data(), {});
  CHECK(out == wanted.out);

  std::vector<uint16_t> grads(half.size());
  const auto grad_at = [&](int64_t head) {
    return MutableHeadRows{grads.data() + head * 16, FloatType::bf16, width, 16};
  };
  attention_backward(plan_of(c), at(0), at(0), at(4), at(6), rows(std::as_const(out), 4, 16),
                     lse.data(), grad_at(0), grad_at(4), grad_at(6), {});
  std::vector<float> found(grads.size());
  budwood::quant::kernels::bf16_to_fp32(grads.data(), found.data(), tokens * width);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < 32; ++i) {
      CHECK(found[static_cast<size_t>(t * width + 64 + i)] ==
            doctest::Approx(wanted.dk[static_cast<size_t>(t * 32 + i)]).epsilon(0.005));
      CHECK(found[static_cast<size_t>(t * width + 96 + i)] ==
            doctest::Approx(wanted.dv[static_cast<size_t>(t * 32 + i)]).epsilon(0.005));
    }
}

TEST_CASE("NaN in one query stays in its row, NaN in a key reaches who sees it") {
  const Case c{"", 2, 1, 16, {0, 50}, {0, 50}};
  auto in = inputs_of(c);
  in.q[static_cast<size_t>((10 * 2 + 1) * 16)] = std::nanf("");
  in.k[static_cast<size_t>(40 * 16)] = std::nanf("");
  on_each_isa([&] {
    const auto found = run(c, in.q, in.k, in.v, in.dout);
    for (int64_t t = 0; t < 50; ++t)
      for (int64_t h = 0; h < 2; ++h)
        CHECK(std::isnan(found.out[static_cast<size_t>((t * 2 + h) * 16)]) ==
              (t >= 40 || (t == 10 && h == 1)));
  });
}
