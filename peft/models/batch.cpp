#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/batch.h>
#include <budwood/quant/error.h>
#include <algorithm>

namespace budwood::models {
namespace {

at::Tensor positions_of(const std::vector<int64_t>& cu) {
  auto positions = at::empty({cu.back()}, at::kLong);
  auto* p = positions.data_ptr<int64_t>();
  for (size_t s = 0; s + 1 < cu.size(); ++s)
    for (int64_t i = cu[s]; i < cu[s + 1]; ++i) p[i] = i - cu[s];
  return positions;
}

void check_rows(const at::Tensor& ids) {
  if (ids.dim() != 2 || ids.scalar_type() != at::kLong)
    throw Error("TokenBatch", fmt::format("ids are int64 [rows, tokens], found {} dimensions of {}",
                                          ids.dim(), c10::toString(ids.scalar_type())));
}

}  // namespace

int64_t TokenBatch::longest() const {
  int64_t most = 0;
  for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s)
    most = std::max(most, cu_seqlens[s + 1] - cu_seqlens[s]);
  return most;
}

TokenBatch TokenBatch::from_rows(const at::Tensor& ids) {
  check_rows(ids);
  TokenBatch batch;
  for (int64_t s = 0; s <= ids.size(0); ++s) batch.cu_seqlens.push_back(s * ids.size(1));
  batch.ids = ids.reshape({-1});
  batch.positions = positions_of(batch.cu_seqlens);
  return batch;
}

TokenBatch TokenBatch::from_rows(const at::Tensor& ids, const at::Tensor& mask) {
  check_rows(ids);
  if (mask.sizes() != ids.sizes())
    throw Error("TokenBatch", "the mask has the shape of ids, [rows, tokens]");
  const auto kept = mask.ne(0);
  const auto lengths = kept.sum(1).to(at::kLong).contiguous();
  TokenBatch batch;
  batch.cu_seqlens.push_back(0);
  for (int64_t s = 0; s < ids.size(0); ++s)
    batch.cu_seqlens.push_back(batch.cu_seqlens.back() + lengths[s].item<int64_t>());
  batch.ids = ids.masked_select(kept);
  batch.positions = positions_of(batch.cu_seqlens);
  return batch;
}

TokenBatch TokenBatch::from_sequences(const std::vector<std::vector<int64_t>>& sequences) {
  TokenBatch batch;
  batch.cu_seqlens.push_back(0);
  std::vector<int64_t> flat;
  for (const auto& sequence : sequences) {
    flat.insert(flat.end(), sequence.begin(), sequence.end());
    batch.cu_seqlens.push_back(static_cast<int64_t>(flat.size()));
  }
  batch.ids = at::tensor(flat, at::kLong);
  batch.positions = positions_of(batch.cu_seqlens);
  return batch;
}

}  // namespace budwood::models
