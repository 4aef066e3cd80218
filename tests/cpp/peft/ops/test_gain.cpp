#include <budwood/peft/ops/gain.h>

#include "gradients.h"

using budwood::ops::gain_gradient;
using budwood::quant::Weight;

TEST_CASE("the gradient of a gain comes from results, and from what made them where it is 0") {
  torch::manual_seed(0);
  for (const auto type : {torch::kFloat, torch::kDouble})
    for (const bool low_rank : {false, true}) {
      const auto w = torch::randn({7, 5}, type), x = torch::randn({40, 5}, type),
                 u = torch::randn({40, 2}, type), b = torch::randn({7, 2}, type),
                 dy = torch::randn({40, 7}, type);
      auto gain = torch::randn({7}, type);
      gain[0] = gain[5] = 0;
      auto z = x.matmul(w.t());
      if (low_rank) z = z + 0.5 * u.matmul(b.t());
      const auto weight = Weight::dense(w);
      const auto none = at::Tensor();
      int reads = 0;
      const auto read = [&] {
        ++reads;
        return x;
      };
      const auto found = gain_gradient(
          dy, gain * z, gain, {weight, read, low_rank ? u : none, low_rank ? b : none, 0.5});
      const double bound = type == torch::kDouble ? 1e-11 : 1e-4;
      CHECK(torch::allclose(found, (dy * z).sum(0), bound, bound));
      CHECK(reads == 2);
    }
}
