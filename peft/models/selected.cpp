#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <budwood/peft/kernels/draw.h>
#include <budwood/peft/models/key_value_tape.h>
#include <budwood/peft/models/selected.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>
#include <memory>

namespace budwood::models {
namespace {

constexpr const char* kWhere = "selected_loss";

// What adapters elsewhere than on projections and tables do depends on whole sequences.
void require_row_by_row(const CausalLM& model) {
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const auto* slot = dynamic_cast<const Slot*>(item.value().get());
    if (slot == nullptr || slot->active().empty()) continue;
    if (slot->kind() != SlotKind::linear && slot->kind() != SlotKind::embedding)
      throw Error(kWhere,
                  fmt::format("the adapter at {} looks at whole sequences: tokens are chosen "
                              "with adapters of projections and tables (LoRA and its "
                              "family, IA3)",
                              item.key()));
  }
}

void check_rows(const TokenBatch& batch, const std::vector<int64_t>& rows) {
  for (size_t i = 0; i < rows.size(); ++i)
    if (rows[i] < 0 || rows[i] >= batch.tokens() || (i > 0 && rows[i] <= rows[i - 1]))
      throw Error(kWhere,
                  fmt::format("row {} of the chosen ones is {}: wanted rising numbers below "
                              "{}",
                              i, rows[i], batch.tokens()));
  for (int64_t s = 0; s < batch.sequences(); ++s) {
    const auto first = std::ranges::lower_bound(rows, batch.cu_seqlens[static_cast<size_t>(s)]);
    if (first == rows.end() || *first >= batch.cu_seqlens[static_cast<size_t>(s) + 1])
      throw Error(kWhere, fmt::format("no token of sequence {} is chosen", s));
  }
}

// The chosen rows as a batch of their own.
TokenBatch part_of(const TokenBatch& batch, const std::vector<int64_t>& rows,
                   const at::Tensor& index) {
  TokenBatch part;
  part.ids = batch.ids.index_select(0, index);
  part.positions = batch.positions.index_select(0, index);
  for (const int64_t end : batch.cu_seqlens)
    part.cu_seqlens.push_back(std::ranges::lower_bound(rows, end) - rows.begin());
  return part;
}

}  // namespace

LossSum selected_loss(CausalLM& model, const TokenBatch& batch, const at::Tensor& labels,
                      const std::vector<int64_t>& rows) {
  require_row_by_row(model);
  check_rows(batch, rows);
  const auto tape = std::make_shared<KeyValueTape>();
  tape->positions = batch.positions;
  tape->cu_seqlens = batch.cu_seqlens;
  {
    const at::NoGradGuard no_grad;
    auto whole = batch;
    whole.tape = tape;
    model.hidden(whole);
  }
  tape->rows = at::tensor(rows, at::kLong).to(batch.ids.device());
  auto part = part_of(batch, rows, tape->rows);
  part.tape = tape;
  return model.loss(part, labels.index_select(0, tape->rows));
}

std::vector<int64_t> select_tokens(const TokenBatch& batch, const at::Tensor& labels, double amount,
                                   uint64_t seed, int64_t step, int64_t part) {
  if (!(amount > 0))
    throw Error("select_tokens", fmt::format("the amount is {}, wanted more than 0", amount));
  const auto on_host = labels.cpu().contiguous();
  const auto* label = on_host.const_data_ptr<int64_t>();
  std::vector<int64_t> rows;
  for (int64_t s = 0; s < batch.sequences(); ++s) {
    const int64_t begin = batch.cu_seqlens[static_cast<size_t>(s)];
    const int64_t end = batch.cu_seqlens[static_cast<size_t>(s) + 1], length = end - begin;
    const auto wanted = amount >= 1
                            ? static_cast<int64_t>(amount)
                            : static_cast<int64_t>(std::ceil(amount * static_cast<double>(length)));
    if (wanted > length)
      throw Error("select_tokens",
                  fmt::format("{} tokens are to be chosen of each sequence, one has {}: choose a "
                              "part of each, 0.25 for one",
                              wanted, length));
    std::vector<int64_t> own = {begin};
    if (wanted > 1) own.push_back(end - 1);
    std::vector<int64_t> counted, others;
    for (int64_t row = begin + 1; row < end - 1; ++row)
      (label[row] >= 0 ? counted : others).push_back(row);
    for (const auto* among : {&counted, &others}) {
      const auto n = static_cast<int64_t>(among->size());
      const int64_t take = std::clamp<int64_t>(wanted - static_cast<int64_t>(own.size()), 0, n);
      const auto stream = static_cast<uint32_t>(2 * s + (among == &others));
      const kernels::DrawKey key{seed, stream, static_cast<uint32_t>(part),
                                 static_cast<uint32_t>(step)};
      for (const int64_t i : kernels::draw(n, take, key))
        own.push_back((*among)[static_cast<size_t>(i)]);
    }
    std::ranges::sort(own);
    own.erase(std::unique(own.begin(), own.end()), own.end());
    rows.insert(rows.end(), own.begin(), own.end());
  }
  return rows;
}

}  // namespace budwood::models
