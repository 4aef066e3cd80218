#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/peft/io/file.h>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace budwood::train {

/// Tokenised rows to train on. One row is one document or one conversation; each token states
/// whether the loss counts on it, that is, whether it is to be predicted.
class Dataset {
 public:
  virtual ~Dataset() = default;
  virtual int64_t rows() const = 0;
  virtual int64_t tokens() const = 0;
  /// Token ids of a row, each below 2^31.
  virtual std::span<const uint32_t> ids(int64_t row) const = 0;
  virtual bool counts(int64_t row, int64_t token) const = 0;
  /// How many tokens in [begin, end) of a row count.
  virtual int64_t counted(int64_t row, int64_t begin, int64_t end) const;
  /// Differs for different data; a run resumes only with the data it was started with.
  virtual uint32_t checksum() const = 0;
  /// Throws Error with row, position and id when an id is not below vocab_size.
  virtual void check(int64_t vocab_size) const;
};

/// A row as tensors.
struct Row {
  at::Tensor ids;      ///< int32 [n], a view of the file
  at::Tensor counted;  ///< bool [n]
};

/// A token file (docs/formats.md), mapped. open() reads it once and refuses what is not whole and
/// consistent, so that nothing later has to be checked again.
class TokenFile final : public Dataset {
 public:
  static std::shared_ptr<TokenFile> open(const std::filesystem::path& path);
  static std::shared_ptr<TokenFile> parse(std::shared_ptr<io::MappedFile> file);

  int64_t rows() const override { return rows_; }
  int64_t tokens() const override { return tokens_; }
  /// Tokens on which the loss counts, in all rows.
  int64_t counted() const { return counted_; }
  int64_t vocab_size() const { return vocab_size_; }
  /// Of the tokeniser; empty when not stated.
  const std::string& fingerprint() const { return fingerprint_; }
  const std::filesystem::path& path() const { return file_->path(); }

  std::span<const uint32_t> ids(int64_t row) const override;
  bool counts(int64_t row, int64_t token) const override;
  int64_t counted(int64_t row, int64_t begin, int64_t end) const override;
  uint32_t checksum() const override { return checksum_; }
  void check(int64_t vocab_size) const override;
  Row row(int64_t i) const;

 private:
  TokenFile() = default;
  void check_row(int64_t row) const;

  std::shared_ptr<io::MappedFile> file_;
  const uint32_t* ids_ = nullptr;
  const uint8_t* mask_ = nullptr;
  const uint64_t* offsets_ = nullptr;
  int64_t rows_ = 0, tokens_ = 0, counted_ = 0, vocab_size_ = 0, largest_ = 0;
  uint32_t checksum_ = 0;
  std::string fingerprint_;
};

/// Writes a token file row by row. It appears at commit(), whole or not at all.
class TokenFileWriter {
 public:
  /// fingerprint: up to 64 printable ASCII characters that name the tokeniser, or empty.
  TokenFileWriter(const std::filesystem::path& path, int64_t vocab_size,
                  const std::string& fingerprint = "");

  /// counted: one byte per token, 0 or 1; empty = all count. Throws for an empty row, an id outside
  /// the vocabulary and a mask of another length; then the row has not been added.
  void add(std::span<const int64_t> ids, std::span<const uint8_t> counted = {});
  int64_t rows() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t tokens() const { return static_cast<int64_t>(offsets_.back()); }
  int64_t counted() const { return counted_; }
  /// Throws when there is no row or no token that counts.
  void commit();

 private:
  void put(const void* data, size_t bytes);
  void pad();

  io::AtomicFile file_;
  int64_t vocab_size_, counted_ = 0;
  std::string fingerprint_;
  std::vector<uint64_t> offsets_{0};
  std::vector<uint8_t> mask_;
  uint32_t crc_ = 0;
};

}  // namespace budwood::train
