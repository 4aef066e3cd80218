#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <budwood/peft/svd.h>
#include <algorithm>

namespace budwood {

Triplets leading_triplets(const at::Tensor& w, int64_t rank, int64_t iterations,
                          std::optional<at::Generator> generator) {
  constexpr int64_t kOversample = 10;
  const int64_t most = std::min(w.size(0), w.size(1));
  rank = std::min(rank, most);
  if (2 * (rank + kOversample) >= most) {
    auto [u, s, vt] = at::linalg_svd(w, /*full_matrices=*/false);
    return {u.narrow(1, 0, rank), s.narrow(0, 0, rank), vt.narrow(0, 0, rank)};
  }
  if (!generator) generator = at::make_generator<at::CPUGeneratorImpl>(/*seed=*/0);
  auto q = at::empty({w.size(1), rank + kOversample}, w.options()).normal_(0.0, 1.0, generator);
  q = std::get<0>(at::linalg_qr(w.mm(q)));
  for (int64_t i = 0; i < iterations; ++i) {
    q = std::get<0>(at::linalg_qr(w.t().mm(q)));
    q = std::get<0>(at::linalg_qr(w.mm(q)));
  }
  auto [u, s, vt] = at::linalg_svd(q.t().mm(w), /*full_matrices=*/false);
  return {q.mm(u).narrow(1, 0, rank), s.narrow(0, 0, rank), vt.narrow(0, 0, rank)};
}

}  // namespace budwood
