#include <fmt/format.h>

#include <budwood/peft/train/crc32.h>
#include <budwood/peft/train/data.h>
#include <budwood/peft/train/token_format.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cstring>

namespace budwood::train {
namespace {

constexpr const char* kWhere = "TokenFileWriter";

// Before the file is opened, so that a refused writer leaves no trace.
const std::filesystem::path& checked(const std::filesystem::path& path, int64_t vocab_size,
                                     const std::string& fingerprint) {
  if (vocab_size < 1 || static_cast<uint64_t>(vocab_size) > kMaxVocabulary)
    throw Error(kWhere, fmt::format("{}: vocabulary of {}, wanted 1 to {}", path.string(),
                                    vocab_size, kMaxVocabulary));
  if (fingerprint.size() > sizeof(TokenFoot::fingerprint) ||
      !std::all_of(fingerprint.begin(), fingerprint.end(), is_printable))
    throw Error(kWhere, fmt::format("{}: the fingerprint has at most 64 printable ASCII characters "
                                    "and no space, found {} bytes",
                                    path.string(), fingerprint.size()));
  return path;
}

}  // namespace

TokenFileWriter::TokenFileWriter(const std::filesystem::path& path, int64_t vocab_size,
                                 const std::string& fingerprint)
    : file_(checked(path, vocab_size, fingerprint)),
      vocab_size_(vocab_size),
      fingerprint_(fingerprint) {
  char head[kHeadBytes] = {};
  std::memcpy(head, kHeadMagic, 8);
  std::memcpy(head + 8, &kTokenVersion, 4);
  put(head, sizeof(head));
}

void TokenFileWriter::put(const void* data, size_t bytes) {
  file_.write(data, bytes);
  crc_ = crc32(data, bytes, crc_);
}

void TokenFileWriter::pad() {
  const char zeros[8] = {};
  put(zeros, round_up_8(file_.written()) - file_.written());
}

void TokenFileWriter::add(std::span<const int64_t> ids, std::span<const uint8_t> counted) {
  const auto fail = [&](const std::string& fact) {
    throw Error(kWhere, fmt::format("{}: row {}: {}", file_.target().string(), rows(), fact));
  };
  if (ids.empty()) fail("no tokens");
  if (!counted.empty() && counted.size() != ids.size())
    fail(fmt::format("{} tokens and {} mask entries", ids.size(), counted.size()));
  std::vector<uint32_t> narrow(ids.size());
  for (size_t t = 0; t < ids.size(); ++t) {
    if (ids[t] < 0 || ids[t] >= vocab_size_)
      fail(fmt::format("position {}: token id {}, the vocabulary has {} entries", t, ids[t],
                       vocab_size_));
    if (!counted.empty() && counted[t] > 1)
      fail(fmt::format("position {}: mask entry {}, wanted 0 or 1", t, counted[t]));
    narrow[t] = static_cast<uint32_t>(ids[t]);
  }
  put(narrow.data(), 4 * narrow.size());
  uint64_t at = offsets_.back();
  offsets_.push_back(at + ids.size());
  mask_.resize((offsets_.back() + 7) / 8);
  for (size_t t = 0; t < ids.size(); ++t, ++at)
    if (counted.empty() || counted[t]) {
      mask_[at / 8] = static_cast<uint8_t>(mask_[at / 8] | 1u << (at % 8));
      ++counted_;
    }
}

void TokenFileWriter::commit() {
  const auto name = file_.target().string();
  if (rows() == 0) throw Error(kWhere, fmt::format("{}: no rows were added", name));
  if (counted_ == 0)
    throw Error(kWhere, fmt::format("{}: {} tokens, and the loss counts on none of them: there "
                                    "would be nothing to learn",
                                    name, tokens()));
  pad();
  put(mask_.data(), mask_.size());
  pad();
  put(offsets_.data(), 8 * offsets_.size());
  TokenFoot foot = {};
  std::memcpy(foot.magic, kFootMagic, 8);
  foot.vocab_size = static_cast<uint64_t>(vocab_size_);
  foot.rows = static_cast<uint64_t>(rows());
  foot.tokens = offsets_.back();
  foot.counted = static_cast<uint64_t>(counted_);
  std::copy(fingerprint_.begin(), fingerprint_.end(), foot.fingerprint);
  foot.data_crc = crc_;
  foot.foot_crc = crc32(&foot, kFootBytes - 4);
  file_.write(&foot, kFootBytes);
  file_.commit();
}

}  // namespace budwood::train
