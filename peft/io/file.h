#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

/// Files: reading them by mapping, and writing them so that nobody ever sees half of one.
/// Every failure is an Error that names the file and the system's reason.
namespace budwood::io {

/// How a model's files are opened: mapped, or their headers only, to be read piece by piece.
enum class Access { mapped, headers };

/// A whole file, mapped privately: pages are shared with the file until somebody writes to them,
/// and a write never reaches the file. Tensors that view it keep it alive by a shared_ptr.
class MappedFile {
 public:
  /// Maps a regular file; throws for folders, pipes, devices and what cannot be read.
  static std::shared_ptr<MappedFile> open(const std::filesystem::path& path);
  /// A copy of bytes in memory that is read like a file; `name` stands for its path in errors.
  static std::shared_ptr<MappedFile> copy_of(std::string_view bytes, const std::string& name);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  /// Length in bytes, as it was when the file was opened.
  size_t size() const { return size_; }
  /// First byte; null when the file is empty. Aligned to a page unless made by copy_of.
  std::byte* data() const { return data_; }
  /// Lets go of the memory behind a range that nobody needs soon; it is read again from the file,
  /// without what was written to it.
  void release(const std::byte* begin, size_t bytes) const;

 private:
  MappedFile() = default;
  std::filesystem::path path_;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  std::unique_ptr<std::byte[]> owned_;
};

/// A regular file that is read piece by piece, from several threads at a time.
class RandomFile {
 public:
  explicit RandomFile(const std::filesystem::path& path);
  ~RandomFile();
  RandomFile(RandomFile&& other) noexcept;
  RandomFile& operator=(RandomFile&&) = delete;

  const std::filesystem::path& path() const { return path_; }
  /// Length in bytes, as it was when the file was opened.
  uint64_t size() const { return size_; }
  /// `bytes` bytes from `begin` on; throws when the file has not so many.
  void read(uint64_t begin, void* to, size_t bytes) const;

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

/// The whole of a file; throws when it is longer than max_bytes.
std::string read_file(const std::filesystem::path& path, uint64_t max_bytes = uint64_t{1} << 30);

/// Writes a file that appears under its name whole or not at all, even if the process is killed.
/// The bytes go to a hidden file beside the target, which takes the target's name in commit().
/// A symbolic link at the target is replaced, not followed. What killed writers left behind is
/// removed by the next writer of the same target.
class AtomicFile {
 public:
  /// Opens the hidden file; the folder must exist, and a target that exists must be a file.
  explicit AtomicFile(std::filesystem::path target);
  /// Without commit() the hidden file is removed and the target stays as it was.
  ~AtomicFile();
  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&&) = delete;

  void write(const void* data, size_t bytes);
  void write(std::string_view bytes) { write(bytes.data(), bytes.size()); }
  /// Writes `count` zero bytes.
  void pad(uint64_t count);
  uint64_t written() const;
  const std::filesystem::path& target() const;
  /// Syncs the bytes, renames the file to the target, syncs the folder. Once.
  void commit();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Writes `bytes` to a file, atomically.
void write_file(const std::filesystem::path& path, std::string_view bytes);

/// Throws Error(where, ...) when an output is, or holds, something that is read; empty paths are
/// left out.
void require_apart(std::string_view where, const std::filesystem::path& out,
                   const std::vector<std::filesystem::path>& read);

/// What AtomicFolder does with a folder that already stands at the target.
enum class Existing {
  refuse,       ///< throws: in the constructor, and in commit() if it appeared since
  replace,      ///< all of it goes, also files that the new folder does not have
  keep_others,  ///< files the new folder does not have are carried over into it
};

/// Writes a folder that appears under its name whole or not at all. Files are made inside path(),
/// a hidden sibling of the target; commit() syncs them and exchanges the two folders in one step.
/// Where the file system cannot exchange, the old folder is renamed away first, and a kill between
/// the two renames leaves it under a hidden name, from which the next AtomicFolder restores it.
class AtomicFolder {
 public:
  AtomicFolder(std::filesystem::path target, Existing existing);
  ~AtomicFolder();
  AtomicFolder(AtomicFolder&& other) noexcept;
  AtomicFolder& operator=(AtomicFolder&&) = delete;

  /// Where to write the files until commit().
  const std::filesystem::path& path() const;
  const std::filesystem::path& target() const;
  void commit();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace budwood::io
