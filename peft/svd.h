#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace budwood {

/// u [m, r], s [r] falling, vt [r, n].
struct Triplets {
  at::Tensor u, s, vt;
};

/// The leading singular triplets of w [m, n] in its dtype, by subspace iteration from a random
/// start (arXiv 0909.4061, with 10 vectors more than asked for); by a full decomposition where
/// that is no more work. Without a generator the start is always the same.
Triplets leading_triplets(const at::Tensor& w, int64_t rank, int64_t iterations = 6,
                          std::optional<at::Generator> generator = {});

}  // namespace budwood
