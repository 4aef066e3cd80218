#include <budwood/peft/svd.h>
#include <doctest/doctest.h>
#include <torch/torch.h>

using namespace budwood;

TEST_CASE("leading triplets are those of a full decomposition") {
  torch::manual_seed(0);
  const auto f64 = torch::kDouble;
  for (const auto& [m, n, rank] : {std::tuple{90, 120, 5}, std::tuple{120, 90, 40},
                                   std::tuple{7, 3, 9}, std::tuple{6, 6, 1}}) {
    CAPTURE(rank);
    // A spectrum that falls fast, so that the wanted part is well defined.
    const int64_t most = std::min(m, n);
    const auto q = std::get<0>(torch::linalg_qr(torch::randn({m, most}, f64)));
    const auto r = std::get<0>(torch::linalg_qr(torch::randn({n, most}, f64)));
    const auto s = torch::pow(0.7, torch::arange(most, f64));
    const auto w = (q * s).mm(r.t());
    const auto found = leading_triplets(w, rank);
    const int64_t kept = std::min<int64_t>(rank, most);
    REQUIRE(found.s.size(0) == kept);
    CHECK(torch::allclose(found.s, s.narrow(0, 0, kept), 1e-8, 1e-12));
    const auto best = (q.narrow(1, 0, kept) * s.narrow(0, 0, kept)).mm(r.narrow(1, 0, kept).t());
    CHECK(torch::allclose((found.u * found.s).mm(found.vt), best, 1e-6, 1e-7));
    CHECK(torch::equal(found.u, leading_triplets(w, rank).u));
  }
}
