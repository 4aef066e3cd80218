#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/train/crc32.h>
#include <budwood/peft/train/data.h>
#include <budwood/peft/train/token_format.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <bit>
#include <cstring>

namespace budwood::train {
namespace {

// Bits [begin, end) of a mask that are set.
int64_t count_bits(const uint8_t* mask, int64_t begin, int64_t end) {
  int64_t n = 0;
  int64_t t = begin;
  for (; t < end && t % 8 != 0; ++t) n += mask[t / 8] >> (t % 8) & 1;
  for (; end - t >= 64; t += 64) {
    uint64_t word;
    std::memcpy(&word, mask + t / 8, 8);
    n += std::popcount(word);
  }
  for (; t < end; ++t) n += mask[t / 8] >> (t % 8) & 1;
  return n;
}

bool all_zero(const std::byte* begin, const std::byte* end) {
  return std::all_of(begin, end, [](std::byte b) { return b == std::byte{0}; });
}

class Check {
 public:
  explicit Check(const std::filesystem::path& path) : path_(path) {}
  void operator()(bool true_, const std::string& fact) const {
    if (!true_) fail(fact);
  }
  [[noreturn]] void fail(const std::string& fact) const {
    throw Error("TokenFile", fmt::format("{}: {}", path_.string(), fact));
  }

 private:
  const std::filesystem::path& path_;
};

TokenFoot read_foot(const io::MappedFile& file, const Check& check) {
  check(
      file.size() >= kHeadBytes + kFootBytes,
      fmt::format("{} bytes, a token file has at least {}", file.size(), kHeadBytes + kFootBytes));
  check(std::memcmp(file.data(), kHeadMagic, 8) == 0, "does not begin as a token file does");
  uint32_t version;
  std::memcpy(&version, file.data() + 8, 4);
  check(version == kTokenVersion,
        fmt::format("token file version {}, this Budwood reads up to {}", version, kTokenVersion));
  check(all_zero(file.data() + 12, file.data() + kHeadBytes), "the head has bytes that must be 0");
  TokenFoot foot;
  std::memcpy(&foot, file.data() + file.size() - kFootBytes, kFootBytes);
  check(std::memcmp(foot.magic, kFootMagic, 8) == 0,
        "does not end as a token file does: it was cut short or something was appended");
  check(crc32(&foot, kFootBytes - 4) == foot.foot_crc,
        "the checksum of its last 128 bytes is wrong: the file is damaged");
  return foot;
}

// The sizes of all parts follow from the counts, which are checked against overflow first.
TokenLayout check_sizes(const TokenFoot& foot, size_t size, const Check& check) {
  check(foot.vocab_size >= 1 && foot.vocab_size <= kMaxVocabulary,
        fmt::format("vocabulary of {}, wanted 1 to {}", foot.vocab_size, kMaxVocabulary));
  check(foot.rows >= 1, "no rows");
  check(
      foot.tokens >= foot.rows && foot.tokens <= size / 4 && foot.rows <= size / 8,
      fmt::format("{} rows and {} tokens do not fit into {} bytes", foot.rows, foot.tokens, size));
  check(foot.counted >= 1, "the loss counts on none of its tokens");
  check(foot.counted <= foot.tokens,
        fmt::format("{} of {} tokens count", foot.counted, foot.tokens));
  const TokenLayout layout(foot.tokens, foot.rows);
  check(layout.size == size, fmt::format("{} bytes, but {} rows with {} tokens make {}", size,
                                         foot.rows, foot.tokens, layout.size));
  return layout;
}

std::string read_fingerprint(const TokenFoot& foot, const Check& check) {
  const auto* end = foot.fingerprint + sizeof(foot.fingerprint);
  const auto* text_end = std::find(foot.fingerprint, end, '\0');
  check(std::all_of(text_end, end, [](char c) { return c == '\0'; }) &&
            std::all_of(foot.fingerprint, text_end, is_printable),
        "the fingerprint is not printable ASCII padded with zeros");
  check(foot.zeros[0] == 0 && foot.zeros[1] == 0, "the foot has bytes that must be 0");
  return {foot.fingerprint, text_end};
}

}  // namespace

int64_t Dataset::counted(int64_t row, int64_t begin, int64_t end) const {
  int64_t n = 0;
  for (int64_t t = begin; t < end; ++t) n += counts(row, t);
  return n;
}

void Dataset::check(int64_t vocab_size) const {
  for (int64_t r = 0; r < rows(); ++r) {
    const auto row = ids(r);
    for (size_t t = 0; t < row.size(); ++t)
      if (row[t] >= static_cast<uint64_t>(vocab_size))
        throw Error(
            "Dataset::check",
            fmt::format("row {}, position {}: token id {}, but the model's vocabulary has {} "
                        "entries; was the text tokenised for another model?",
                        r, t, row[t], vocab_size));
  }
}

std::shared_ptr<TokenFile> TokenFile::open(const std::filesystem::path& path) {
  return parse(io::MappedFile::open(path));
}

std::shared_ptr<TokenFile> TokenFile::parse(std::shared_ptr<io::MappedFile> file) {
  const Check check(file->path());
  const auto foot = read_foot(*file, check);
  const auto layout = check_sizes(foot, file->size(), check);
  const auto* data = file->data();

  std::shared_ptr<TokenFile> result(new TokenFile);
  auto& f = *result;
  f.rows_ = static_cast<int64_t>(foot.rows);
  f.tokens_ = static_cast<int64_t>(foot.tokens);
  f.counted_ = static_cast<int64_t>(foot.counted);
  f.vocab_size_ = static_cast<int64_t>(foot.vocab_size);
  f.checksum_ = foot.data_crc;
  f.fingerprint_ = read_fingerprint(foot, check);
  f.ids_ = reinterpret_cast<const uint32_t*>(data + kHeadBytes);
  f.mask_ = reinterpret_cast<const uint8_t*>(data + layout.mask);
  f.offsets_ = reinterpret_cast<const uint64_t*>(data + layout.offsets);
  f.file_ = std::move(file);

  check(f.offsets_[0] == 0, fmt::format("row 0 begins at token {}, wanted 0", f.offsets_[0]));
  for (int64_t r = 0; r < f.rows_; ++r)
    check(f.offsets_[r + 1] > f.offsets_[r] && f.offsets_[r + 1] <= foot.tokens,
          fmt::format("row {} is [{}, {}) of {} tokens", r, f.offsets_[r], f.offsets_[r + 1],
                      foot.tokens));
  check(f.offsets_[f.rows_] == foot.tokens,
        fmt::format("the rows end at token {} of {}", f.offsets_[f.rows_], foot.tokens));
  check(crc32(data, layout.size - kFootBytes) == foot.data_crc,
        "the checksum of its data is wrong: the file is damaged");
  check(count_bits(f.mask_, 0, f.tokens_) == f.counted_,
        fmt::format("{} tokens are marked, {} are stated to count",
                    count_bits(f.mask_, 0, f.tokens_), f.counted_));
  const auto padding = kHeadBytes + 4 * foot.tokens;
  check(all_zero(data + padding, data + layout.mask) &&
            count_bits(f.mask_, f.tokens_,
                       static_cast<int64_t>(layout.offsets - layout.mask) * 8) == 0,
        "the padding has bits that must be 0");
  f.largest_ = *std::max_element(f.ids_, f.ids_ + f.tokens_);
  if (f.largest_ >= f.vocab_size_) f.check(f.vocab_size_);
  return result;
}

void TokenFile::check_row(int64_t row) const {
  if (row < 0 || row >= rows_)
    throw Error("TokenFile", fmt::format("row {} of {}: rows are 0 to {}", row, rows_, rows_ - 1));
}

std::span<const uint32_t> TokenFile::ids(int64_t row) const {
  check_row(row);
  return {ids_ + offsets_[row], ids_ + offsets_[row + 1]};
}

bool TokenFile::counts(int64_t row, int64_t token) const {
  const auto t = offsets_[row] + static_cast<uint64_t>(token);
  return mask_[t / 8] >> (t % 8) & 1;
}

int64_t TokenFile::counted(int64_t row, int64_t begin, int64_t end) const {
  const auto at = static_cast<int64_t>(offsets_[row]);
  return count_bits(mask_, at + begin, at + end);
}

void TokenFile::check(int64_t vocab_size) const {
  if (largest_ < vocab_size) return;
  try {
    Dataset::check(vocab_size);
  } catch (const Error& e) {
    throw Error("TokenFile::check", fmt::format("{}: {}", path().string(), e.what()));
  }
}

Row TokenFile::row(int64_t i) const {
  const auto span = ids(i);
  const auto n = static_cast<int64_t>(span.size());
  Row result;
  result.ids = at::from_blob(
      const_cast<uint32_t*>(span.data()), {n}, [file = file_](void*) {},
      at::TensorOptions().dtype(at::kInt));
  result.counted = at::empty({n}, at::kBool);
  auto* mask = result.counted.data_ptr<bool>();
  for (int64_t t = 0; t < n; ++t) mask[t] = counts(i, t);
  return result;
}

}  // namespace budwood::train
