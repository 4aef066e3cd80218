#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/train/sampler.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <numeric>
#include <random>

namespace budwood::train {
namespace {

constexpr int64_t kIgnored = -100;

// Uniform in [0, n). Spelled out because the standard leaves its distributions to the library.
uint64_t below(std::mt19937_64& random, uint64_t n) {
  const uint64_t limit = UINT64_MAX - UINT64_MAX % n;
  for (;;)
    if (const uint64_t r = random(); r < limit) return r % n;
}

std::vector<int64_t> permutation(int64_t n, uint64_t seed, int64_t epoch) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::seed_seq seeds{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                      static_cast<uint32_t>(epoch), static_cast<uint32_t>(epoch >> 32)};
  std::mt19937_64 random(seeds);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[below(random, i)]);
  return order;
}

}  // namespace

Sampler::Sampler(std::shared_ptr<const Dataset> data, SampleOptions options)
    : data_(std::move(data)), options_(std::move(options)) {
  options_.validate();
  if (!data_) throw Error("Sampler", "no dataset was given");
  report_.rows = data_->rows();
  if (options_.packing == "concat")
    plan_concat();
  else
    plan_rows();
  report_.windows = static_cast<int64_t>(windows_.size()) - 1;
  report_.sequences = static_cast<int64_t>(pieces_.size());
  if (report_.windows == 0)
    throw Error(
        "Sampler",
        fmt::format("none of the {} rows has a token to predict within its first {} tokens; "
                    "the mask leaves nothing to learn, or sequence_length is too short",
                    report_.rows, options_.sequence_length + 1));
}

int64_t Sampler::batches() const {
  return (report_.windows + options_.batch_size - 1) / options_.batch_size;
}

void Sampler::restore(SamplePosition position) {
  if (position.epoch < 0 || position.batch < 0 || position.batch >= batches())
    throw Error("Sampler::restore", fmt::format("epoch {}, batch {}: an epoch has {} batches",
                                                position.epoch, position.batch, batches()));
  position_ = position;
}

const std::vector<int64_t>& Sampler::order() {
  if (order_epoch_ == position_.epoch || (!options_.shuffle && order_epoch_ >= 0)) return order_;
  if (options_.shuffle) {
    order_ = permutation(report_.windows, options_.seed, position_.epoch);
  } else {
    order_.resize(static_cast<size_t>(report_.windows));
    std::iota(order_.begin(), order_.end(), 0);
  }
  order_epoch_ = position_.epoch;
  return order_;
}

Batch Sampler::next() {
  const auto& order = this->order();
  const int64_t first = position_.batch * options_.batch_size;
  const int64_t last = std::min(first + options_.batch_size, report_.windows);

  std::vector<const Piece*> pieces;
  Batch batch;
  auto& cu = batch.tokens.cu_seqlens;
  cu.push_back(0);
  for (int64_t i = first; i < last; ++i) {
    const auto w = static_cast<size_t>(order[static_cast<size_t>(i)]);
    for (int64_t p = windows_[w]; p < windows_[w + 1]; ++p) {
      pieces.push_back(&pieces_[static_cast<size_t>(p)]);
      cu.push_back(cu.back() + pieces.back()->length);
    }
  }
  batch.tokens.ids = at::empty({cu.back()}, at::kLong);
  batch.tokens.positions = at::empty({cu.back()}, at::kLong);
  batch.labels = at::empty({cu.back()}, at::kLong);
  auto* ids = batch.tokens.ids.data_ptr<int64_t>();
  auto* positions = batch.tokens.positions.data_ptr<int64_t>();
  auto* labels = batch.labels.data_ptr<int64_t>();
  for (size_t s = 0; s < pieces.size(); ++s)
    append(*pieces[s], ids + cu[s], labels + cu[s], positions + cu[s]);
  batch.counted = std::count_if(labels, labels + cu.back(), [](int64_t l) { return l >= 0; });

  if (++position_.batch == batches()) position_ = {position_.epoch + 1, 0};
  return batch;
}

// Walks length + 1 tokens from the piece's first: each is the label of the one before.
void Sampler::append(const Piece& piece, int64_t* ids, int64_t* labels, int64_t* positions) const {
  int64_t row = piece.row, token = piece.begin;
  auto tokens = data_->ids(row);
  for (int64_t i = 0; i <= piece.length; ++i, ++token) {
    if (token == static_cast<int64_t>(tokens.size())) {
      tokens = data_->ids(++row);
      token = 0;
    }
    const int64_t id = tokens[static_cast<size_t>(token)];
    if (i > 0) labels[i - 1] = data_->counts(row, token) ? id : kIgnored;
    if (i == piece.length) break;
    ids[i] = id;
    positions[i] = i;
  }
}

}  // namespace budwood::train
