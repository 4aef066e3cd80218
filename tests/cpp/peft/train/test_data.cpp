#include "tiny.h"

#include <budwood/peft/train/crc32.h>
#include <budwood/peft/train/data.h>

#include <cstring>

using namespace budwood;
using namespace budwood::train;
using namespace budwood::train::testing;

namespace {

std::string written() {
  const TemporaryFolder folder;
  TokenFileWriter writer(folder / "x", 100, "tok-1");
  writer.add(std::vector<int64_t>{5, 99, 0}, std::vector<uint8_t>{0, 1, 1});
  writer.add(std::vector<int64_t>{7});
  writer.add(std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7}, std::vector<uint8_t>{1, 0, 1, 0, 1, 0, 1});
  writer.commit();
  return io::read_file(folder / "x");
}

template <class T>
T read(const std::string& bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

template <class T>
void put(std::string& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof(T));
}

// Makes the checksums true again, so that what was changed is found for itself.
std::string sealed(std::string bytes) {
  const size_t foot = bytes.size() - 128;
  put(bytes, foot + 120, crc32(bytes.data(), foot));
  put(bytes, foot + 124, crc32(bytes.data() + foot, 124));
  return bytes;
}

std::string refusal(const std::string& bytes) {
  return message_of([&] { TokenFile::parse(io::MappedFile::copy_of(bytes, "bad.tokens")); });
}

}  // namespace

TEST_CASE("CRC-32 gives the standard's check value, in one piece and in several") {
  const std::string text = "123456789";
  CHECK(crc32(text.data(), 9) == 0xCBF43926u);
  const std::string longer(1000, 'q');
  for (const size_t cut : {0, 1, 7, 8, 500, 1000})
    CHECK(crc32(longer.data() + cut, 1000 - cut, crc32(longer.data(), cut)) ==
          crc32(longer.data(), 1000));
}

TEST_CASE("a token file's bytes are those of the specification") {
  const auto bytes = written();
  // 64 head, 11 ids and padding to 112, 2 bytes of bits and padding to 120, 4 offsets, 128 foot
  REQUIRE(bytes.size() == 120 + 32 + 128);
  CHECK(bytes.substr(0, 8) == "BUDWTOKS");
  CHECK(read<uint32_t>(bytes, 8) == 1);
  CHECK(read<uint32_t>(bytes, 64) == 5);
  CHECK(read<uint32_t>(bytes, 68) == 99);
  CHECK(read<uint32_t>(bytes, 64 + 40) == 7);
  CHECK(static_cast<uint8_t>(bytes[112]) == 0b01011110);
  CHECK(static_cast<uint8_t>(bytes[113]) == 0b00000101);
  CHECK(read<uint64_t>(bytes, 120) == 0);
  CHECK(read<uint64_t>(bytes, 128) == 3);
  CHECK(read<uint64_t>(bytes, 136) == 4);
  CHECK(read<uint64_t>(bytes, 144) == 11);
  CHECK(bytes.substr(152, 8) == "BUDWTEND");
  CHECK(read<uint64_t>(bytes, 160) == 100);
  CHECK(read<uint64_t>(bytes, 168) == 3);
  CHECK(read<uint64_t>(bytes, 176) == 11);
  CHECK(read<uint64_t>(bytes, 184) == 7);
  CHECK(bytes.substr(192, 6) == std::string("tok-1\0", 6));
}

TEST_CASE("a token file gives back its rows, masks and fingerprint") {
  const auto file = TokenFile::parse(io::MappedFile::copy_of(written(), "x"));
  CHECK(file->rows() == 3);
  CHECK(file->tokens() == 11);
  CHECK(file->counted() == 7);
  CHECK(file->vocab_size() == 100);
  CHECK(file->fingerprint() == "tok-1");
  const auto row = file->row(0);
  CHECK(row.ids.to(at::kLong).equal(at::tensor(std::vector<int64_t>{5, 99, 0}, at::kLong)));
  CHECK(row.counted.sum().item<int64_t>() == 2);
  CHECK_FALSE(row.counted[0].item<bool>());
  CHECK(file->counted(2, 0, 7) == 4);
  CHECK(file->counted(2, 1, 6) == 2);
  CHECK(file->row(1).counted.all().item<bool>());
  CHECK(contains(message_of([&] { file->row(3); }), "row 3 of 3"));
  CHECK(contains(message_of([&] { file->row(-1); }), "row -1"));
}

TEST_CASE("counted bits of a range equal a count one by one") {
  const auto rows = random_rows(40, 300, 4);
  const TemporaryFolder folder;
  TokenFileWriter writer(folder / "x", kVocabulary);
  for (int64_t r = 0; r < rows->rows(); ++r) {
    std::vector<int64_t> ids(rows->ids(r).begin(), rows->ids(r).end());
    std::vector<uint8_t> mask;
    for (size_t t = 0; t < ids.size(); ++t)
      mask.push_back(rows->counts(r, static_cast<int64_t>(t)));
    writer.add(ids, mask);
  }
  writer.commit();
  const auto file = TokenFile::open(folder / "x");
  for (int64_t r = 0; r < rows->rows(); ++r) {
    const auto n = static_cast<int64_t>(rows->ids(r).size());
    for (const auto& [a, b] : {std::pair<int64_t, int64_t>{0, n}, {1, n}, {n / 3, n / 2}, {n, n}})
      CHECK(file->counted(r, a, b) == rows->counted(r, a, b));
  }
}

TEST_CASE("a token id beyond a model's vocabulary is named with row and position") {
  const auto file = TokenFile::parse(io::MappedFile::copy_of(written(), "x"));
  file->check(100);
  const auto message = message_of([&] { file->check(99); });
  CHECK(contains(message, "row 0, position 1: token id 99"));
  CHECK(contains(message, "99 entries"));
}

TEST_CASE("what cannot be a row or a file is refused by the writer and leaves no file") {
  const TemporaryFolder folder;
  const auto path = folder / "x";
  {
    TokenFileWriter writer(path, 10);
    CHECK(contains(message_of([&] { writer.add(std::vector<int64_t>{}); }), "row 0: no tokens"));
    CHECK(contains(message_of([&] {
                     writer.add(std::vector<int64_t>{1, 10});
                   }),
                   "row 0: position 1: token id 10, the vocabulary has 10"));
    CHECK(contains(message_of([&] { writer.add(std::vector<int64_t>{-1}); }), "token id -1"));
    CHECK(contains(message_of([&] {
                     writer.add(std::vector<int64_t>{1, 2}, std::vector<uint8_t>{1});
                   }),
                   "2 tokens and 1 mask"));
    CHECK(contains(message_of([&] { writer.commit(); }), "no rows"));
    writer.add(std::vector<int64_t>{1, 2}, std::vector<uint8_t>{0, 0});
    CHECK(contains(message_of([&] { writer.commit(); }), "counts on none"));
  }
  CHECK_FALSE(std::filesystem::exists(path));
  CHECK(contains(message_of([&] { TokenFileWriter writer(path, 0); }), "vocabulary of 0"));
  CHECK(contains(message_of([&] { TokenFileWriter writer(path, 5, std::string(65, 'x')); }),
                 "fingerprint"));
}

TEST_CASE("a file cut short at any byte, or with any bit flipped, is refused") {
  const auto good = written();
  CHECK(refusal(good).empty());
  for (size_t n = 0; n < good.size(); ++n) CHECK_FALSE(refusal(good.substr(0, n)).empty());
  CHECK_FALSE(refusal(good + std::string(8, '\0')).empty());
  for (size_t at = 0; at < good.size(); ++at)
    for (const int bit : {0, 7}) {
      auto bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 << bit));
      CHECK_FALSE(refusal(bad).empty());
    }
}

TEST_CASE("fields that lie are refused although their checksums are right") {
  const auto good = written();
  const size_t foot = good.size() - 128;
  const auto with = [&](size_t at, auto value) {
    auto bad = good;
    put(bad, at, value);
    return refusal(sealed(bad));
  };
  CHECK(refusal(sealed(good)).empty());
  CHECK(contains(with(8, uint32_t{2}), "version 2"));
  CHECK(contains(with(20, uint32_t{1}), "head"));
  CHECK(contains(with(64, uint32_t{100}), "row 0, position 0: token id 100"));
  CHECK(contains(with(108, uint32_t{1}), "padding"));
  CHECK(contains(with(113, uint8_t{0b10000101}), "padding"));
  CHECK(contains(with(112, uint8_t{0b01011100}), "6 tokens are marked, 7"));
  CHECK(contains(with(120, uint64_t{1}), "row 0 begins"));
  CHECK(contains(with(128, uint64_t{5}), "row 1 is [5, 4)"));
  CHECK(contains(with(128, ~uint64_t{0}), "of 11 tokens"));
  CHECK(contains(with(136, uint64_t{3}), "row 1 is [3, 3)"));
  CHECK(contains(with(144, uint64_t{10}), "end at token 10"));
  CHECK(contains(with(foot + 8, uint64_t{0}), "vocabulary of 0"));
  CHECK(contains(with(foot + 8, uint64_t{1} << 40), "vocabulary"));
  CHECK(contains(with(foot + 8, uint64_t{50}), "token id 99"));
  CHECK(contains(with(foot + 16, uint64_t{0}), "no rows"));
  CHECK(contains(with(foot + 16, uint64_t{4}), "bytes"));
  CHECK(contains(with(foot + 16, ~uint64_t{0}), "do not fit"));
  CHECK(contains(with(foot + 24, uint64_t{1} << 62), "do not fit"));
  CHECK(contains(with(foot + 24, uint64_t{12}), "end at token 11 of 12"));
  CHECK(contains(with(foot + 24, uint64_t{13}), "280 bytes"));
  CHECK(contains(with(foot + 32, uint64_t{0}), "none"));
  CHECK(contains(with(foot + 32, uint64_t{12}), "12 of 11"));
  CHECK(contains(with(foot + 32, uint64_t{6}), "7 tokens are marked, 6"));
  CHECK(contains(with(foot + 50, 'x'), "fingerprint"));
  CHECK(contains(with(foot + 41, '\n'), "fingerprint"));
  CHECK(contains(with(foot + 104, uint64_t{1}), "must be 0"));
}

TEST_CASE("mapped rows outlive the file object") {
  const TemporaryFolder folder;
  io::write_file(folder / "x", written());
  auto file = TokenFile::open(folder / "x");
  const auto row = file->row(2);
  file.reset();
  CHECK(row.ids.sum().item<int64_t>() == 28);
}
