#include <budwood/peft/kernels/noise_paths.h>
#include <budwood/quant/kernels/isa.h>

#include <algorithm>

namespace budwood::kernels {

PhiloxWords philox(const PhiloxWords& counter, uint32_t key0, uint32_t key1) {
  auto x = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * x.word[0], b = uint64_t{0xCD9E8D57u} * x.word[2];
    x = {static_cast<uint32_t>(b >> 32) ^ x.word[1] ^ key0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ x.word[3] ^ key1, static_cast<uint32_t>(a)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return x;
}

void normal(const NoiseKey& key, uint64_t begin, int64_t n, float* z) {
  const auto& path = quant::kernels::active_path(kNoiseScalar, kNoiseAvx2, kNoiseAvx512);
  alignas(64) float block[kNoiseNumbers];
  const uint64_t end = begin + static_cast<uint64_t>(n);
  for (uint64_t at = begin; at < end;) {
    const uint64_t first = at / 4;  // the counter that the block begins with
    path.normal(key, first, block);
    const uint64_t until = std::min(end, 4 * first + kNoiseNumbers);
    std::copy(block + (at - 4 * first), block + (until - 4 * first), z + (at - begin));
    at = until;
  }
}

}  // namespace budwood::kernels
