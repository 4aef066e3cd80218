#include "tiny.h"

#include <budwood/peft/train/sampler.h>

#include <algorithm>
#include <map>
#include <set>

using namespace budwood;
using namespace budwood::train;
using namespace budwood::train::testing;

namespace {

std::vector<int64_t> values(const at::Tensor& t) {
  return {t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel()};
}

struct Sequence {
  std::vector<int64_t> ids, labels, positions;
  auto operator<=>(const Sequence&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Sequence& s) {
  return out << "{" << at::IntArrayRef(s.ids) << " -> " << at::IntArrayRef(s.labels) << "}";
}

std::vector<Sequence> sequences(const Batch& batch) {
  std::vector<Sequence> all;
  const auto& cu = batch.tokens.cu_seqlens;
  for (size_t s = 0; s + 1 < cu.size(); ++s) {
    const auto part = [&](const at::Tensor& t) {
      return values(t.slice(0, cu[s], cu[s + 1]).contiguous());
    };
    all.push_back({part(batch.tokens.ids), part(batch.labels), part(batch.tokens.positions)});
  }
  return all;
}

std::vector<Sequence> epoch_of(Sampler& sampler) {
  std::vector<Sequence> all;
  const auto epoch = sampler.state().epoch;
  while (sampler.state().epoch == epoch)
    for (auto& s : sequences(sampler.next())) all.push_back(std::move(s));
  return all;
}

SampleOptions plain(const std::string& packing, int64_t length, int64_t batch = 2) {
  return {length, batch, packing, "truncate", false, 0};
}

}  // namespace

TEST_CASE("concat predicts every token but the first exactly once, across row borders") {
  const auto data = random_rows(20, 9);
  std::vector<int64_t> stream, counts;
  for (int64_t r = 0; r < data->rows(); ++r)
    for (size_t t = 0; t < data->ids(r).size(); ++t) {
      stream.push_back(data->ids(r)[t]);
      counts.push_back(data->counts(r, static_cast<int64_t>(t)));
    }
  for (const int64_t length : {1, 5, 7, 1000}) {
    Sampler sampler(data, plain("concat", length));
    std::vector<int64_t> expected_counted;
    size_t at = 0;
    int64_t counted = 0;
    for (const auto& s : epoch_of(sampler)) {
      // Windows without a counted label are left out; the others follow each other in the stream.
      const auto matches = [&] {
        for (size_t i = 0; i < s.ids.size(); ++i)
          if (at + i + 1 >= stream.size() || s.ids[i] != stream[at + i] ||
              s.positions[i] != static_cast<int64_t>(i) ||
              s.labels[i] != (counts[at + i + 1] ? stream[at + i + 1] : -100))
            return false;
        return true;
      };
      while (at + 1 < stream.size() && !matches()) at += static_cast<size_t>(length);
      REQUIRE(at + 1 < stream.size());
      counted += std::count_if(s.labels.begin(), s.labels.end(), [](int64_t l) { return l >= 0; });
      at += s.ids.size();
    }
    CHECK(counted == std::count(counts.begin() + 1, counts.end(), 1));
    CHECK(sampler.report().counted == counted);
    CHECK(sampler.report().longest <= length);
  }
}

TEST_CASE(
    "no packing gives one sequence for each row, labels shifted by one, first token no target") {
  const auto data =
      std::make_shared<Rows>(std::vector<std::vector<uint32_t>>{{1, 2, 3}, {4, 5}, {6}, {7, 8, 9}},
                             std::vector<std::vector<uint8_t>>{{1, 0, 1}, {1, 1}, {1}, {1, 0, 0}});
  Sampler sampler(data, plain("none", 10));
  const auto all = epoch_of(sampler);
  REQUIRE(all.size() == 2);
  CHECK((all[0] == Sequence{{1, 2}, {-100, 3}, {0, 1}}));
  CHECK((all[1] == Sequence{{4}, {5}, {0}}));
  CHECK(sampler.report().skipped_rows == 2);
  CHECK(sampler.report().counted == 2);
  CHECK(contains(sampler.report().summary(), "2 rows were skipped"));
}

TEST_CASE("packing gives the same sequences as no packing, in windows that hold them whole") {
  const auto data = random_rows(50, 12);
  Sampler separate(data, plain("none", 12, 1)), packed(data, plain("pack", 12, 1));
  auto a = epoch_of(separate);
  std::vector<Sequence> b;
  const auto windows = packed.report().windows;
  for (int64_t w = 0; w < windows; ++w) {
    const auto batch = packed.next();
    CHECK(batch.tokens.tokens() <= 12);
    for (auto& s : sequences(batch)) b.push_back(std::move(s));
  }
  std::sort(a.begin(), a.end());
  std::sort(b.begin(), b.end());
  CHECK(a == b);
  CHECK(packed.report().counted == separate.report().counted);
  CHECK(windows * 12 < packed.report().tokens * 1.2);  // best fit wastes little
  CHECK(windows < separate.report().windows);
}

TEST_CASE("rows that are too long are truncated and counted, or split without losing a label") {
  const auto data = random_rows(30, 40, 9);
  for (const std::string packing : {"pack", "none"}) {
    Sampler cut(data, {8, 3, packing, "truncate", false, 0});
    Sampler split(data, {8, 3, packing, "split", false, 0});
    int64_t longer = 0, lost = 0, all_counted = 0;
    for (int64_t r = 0; r < data->rows(); ++r) {
      const auto inputs = static_cast<int64_t>(data->ids(r).size()) - 1;
      longer += inputs > 8;
      lost += std::max<int64_t>(0, inputs - 8);
      all_counted += data->counted(r, 1, inputs + 1);
    }
    CHECK(cut.report().truncated_rows == longer);
    CHECK(cut.report().dropped_tokens == lost);
    CHECK(split.report().truncated_rows == 0);
    CHECK(split.report().counted == all_counted);
    int64_t counted = 0;
    for (const auto& s : epoch_of(split)) {
      CHECK(s.ids.size() <= 8);
      counted += std::count_if(s.labels.begin(), s.labels.end(), [](int64_t l) { return l >= 0; });
    }
    CHECK(counted == all_counted);
  }
}

TEST_CASE("a shuffled epoch has the same sequences in another order, and each epoch its own") {
  const auto data = random_rows(40, 6);
  SampleOptions options{6, 4, "none", "truncate", true, 11};
  Sampler sampler(data, options), again(data, options), ordered(data, plain("none", 6, 4));
  auto first = epoch_of(sampler), second = epoch_of(sampler), plain_order = epoch_of(ordered);
  CHECK(first == epoch_of(again));
  CHECK(first != second);
  CHECK(first != plain_order);
  options.seed = 12;
  Sampler other(data, options);
  CHECK(first != epoch_of(other));
  std::sort(first.begin(), first.end());
  std::sort(second.begin(), second.end());
  std::sort(plain_order.begin(), plain_order.end());
  CHECK(first == second);
  CHECK(first == plain_order);
}

TEST_CASE("a restored sampler gives exactly the batches that would have come") {
  const auto data = random_rows(23, 10);
  for (const std::string packing : {"concat", "pack", "none"}) {
    const SampleOptions options{7, 3, packing, "split", true, 5};
    Sampler sampler(data, options);
    for (int i = 0; i < 40; ++i) {
      const auto position = sampler.state();
      Sampler fresh(data, options);
      fresh.restore(position);
      const auto expected = sampler.next(), found = fresh.next();
      CHECK(expected.tokens.ids.equal(found.tokens.ids));
      CHECK(expected.labels.equal(found.labels));
      CHECK(expected.tokens.positions.equal(found.tokens.positions));
      CHECK(expected.tokens.cu_seqlens == found.tokens.cu_seqlens);
      CHECK(expected.counted == found.counted);
      CHECK(expected.counted > 0);
    }
    CHECK(contains(message_of([&] { sampler.restore({0, sampler.batches()}); }), "an epoch has"));
  }
}

TEST_CASE("data without anything to predict and options out of range are refused by name") {
  const auto masked = std::make_shared<Rows>(std::vector<std::vector<uint32_t>>{{1, 2}, {3, 4}},
                                             std::vector<std::vector<uint8_t>>{{1, 0}, {0, 0}});
  CHECK(contains(message_of([&] { Sampler s(masked, plain("pack", 8)); }), "none of the 2 rows"));
  const auto data = random_rows(3, 5);
  CHECK(
      contains(message_of([&] { Sampler s(data, plain("packed", 8)); }), "packing is \"packed\""));
  CHECK(contains(message_of([&] { Sampler s(data, plain("pack", 0)); }), "sequence_length is 0"));
  CHECK(contains(message_of([&] { Sampler s(data, plain("pack", 4, 0)); }), "batch_size is 0"));
  CHECK(contains(message_of([&] { Sampler s(data, {4, 1, "pack", "drop"}); }), "long_rows"));
}
