#include <doctest/doctest.h>
#include <torch/torch.h>

#include <budwood/peft/ops/attention.h>
#include <budwood/quant/error.h>

using budwood::ops::attention;
using budwood::ops::AttentionShape;

namespace {

// One query at a time, in float64.
torch::Tensor reference(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                        const AttentionShape& shape) {
  auto out = torch::zeros_like(q);
  const int64_t group = q.size(1) / k.size(1);
  for (size_t s = 0; s + 1 < shape.cu_q.size(); ++s) {
    const auto tq = shape.cu_q[s + 1] - shape.cu_q[s], tk = shape.cu_k[s + 1] - shape.cu_k[s];
    for (int64_t i = 0; i < tq; ++i)
      for (int64_t h = 0; h < q.size(1); ++h) {
        const int64_t last = tk - tq + i;
        const int64_t first = shape.window > 0 ? std::max<int64_t>(0, last - shape.window + 1) : 0;
        const auto keys =
            k.slice(0, shape.cu_k[s] + first, shape.cu_k[s] + last + 1).select(1, h / group);
        const auto values =
            v.slice(0, shape.cu_k[s] + first, shape.cu_k[s] + last + 1).select(1, h / group);
        const auto p = (keys.matmul(q[shape.cu_q[s] + i][h]) * shape.scale).softmax(0);
        out[shape.cu_q[s] + i][h] = p.matmul(values);
      }
  }
  return out;
}

}  // namespace

TEST_CASE("attention equals one query at a time: groups, windows, ragged rows, cached keys") {
  torch::manual_seed(0);
  const AttentionShape shapes[] = {
      {{0, 6}, {0, 6}, 0.3, 0},
      {{0, 4, 8}, {0, 4, 8}, 0.3, 0},
      {{0, 3, 4, 9}, {0, 3, 4, 9}, 0.3, 0},
      {{0, 6}, {0, 6}, 0.3, 2},
      {{0, 3, 9}, {0, 3, 9}, 0.3, 4},
      {{0, 1}, {0, 7}, 0.3, 0},
      {{0, 2, 4}, {0, 5, 10}, 0.3, 0},
      {{0, 1, 2}, {0, 5, 10}, 0.3, 3},
      {{0, 6}, {0, 6}, 0.3, 100},
  };
  for (const auto& shape : shapes) {
    auto q = torch::randn({shape.cu_q.back(), 4, 8}, torch::kDouble).requires_grad_();
    auto k = torch::randn({shape.cu_k.back(), 2, 8}, torch::kDouble).requires_grad_();
    auto v = torch::randn({shape.cu_k.back(), 2, 8}, torch::kDouble).requires_grad_();
    const auto found = attention(q, k, v, shape);
    const auto wanted = reference(q, k, v, shape);
    CHECK(torch::allclose(found, wanted, 1e-10, 1e-10));
    const auto g = torch::randn_like(found);
    const auto grads = torch::autograd::grad({found}, {q, k, v}, {g});
    const auto exact = torch::autograd::grad({wanted}, {q, k, v}, {g});
    for (size_t i = 0; i < 3; ++i) CHECK(torch::allclose(grads[i], exact[i], 1e-9, 1e-9));
  }
}

TEST_CASE("tensors that do not fit are refused") {
  const auto q = torch::randn({4, 3, 8}), k = torch::randn({4, 2, 8});
  CHECK_THROWS_AS(attention(q, k, k, {{0, 4}, {0, 4}, 1.0, 0}), budwood::Error);
  CHECK_THROWS_AS(attention(k, k, k, {{0, 3}, {0, 4}, 1.0, 0}), budwood::Error);
}
