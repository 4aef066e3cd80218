#include <budwood/peft/io/file.h>
#include <budwood/peft/io/staging.h>
#include <budwood/quant/error.h>
#include <errno.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

namespace budwood::io {
namespace fs = std::filesystem;
namespace {
constexpr size_t kBuffer = size_t{1} << 18;
// Bytes after which the system is asked to begin writing them to the disk.
constexpr uint64_t kAhead = uint64_t{1} << 24;
constexpr std::string_view kWhere = "AtomicFile";
}  // namespace

struct AtomicFile::State {
  fs::path target;
  Staged staged;
  pid_t owner = 0;
  uint64_t written = 0;
  std::string buffer;
  bool failed = false;
  uint64_t given = 0, begun = 0;  // bytes that the system has, and those of them on their way

  ~State() {
    if (staged.fd < 0) return;
    // A forked child holds a copy of this object; the file belongs to the parent.
    if (::getpid() == owner) ::unlink(staged.path.c_str());
    ::close(staged.fd);
  }

  void write_through(const char* data, size_t bytes) {
    while (bytes > 0) {
      const ssize_t n = ::write(staged.fd, data, bytes);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {
        failed = true;
        const int error = n < 0 ? errno : ENOSPC;
        throw Error(kWhere, fmt::format("cannot write {}: {}; nothing was saved", target.string(),
                                        std::generic_category().message(error)));
      }
      data += n;
      bytes -= static_cast<size_t>(n);
      given += static_cast<uint64_t>(n);
    }
    begin_writing_back();
  }

  // So that commit() does not wait for all of a large file. Only a hint: fsync is what counts.
  void begin_writing_back() {
#ifdef __linux__
    if (given - begun < kAhead) return;
    (void)::sync_file_range(staged.fd, static_cast<off_t>(begun), static_cast<off_t>(given - begun),
                            SYNC_FILE_RANGE_WRITE);
    begun = given;
#endif
  }

  void flush() {
    write_through(buffer.data(), buffer.size());
    buffer.clear();
  }

  void check_usable() const {
    if (staged.fd < 0)
      throw Error(kWhere, fmt::format("{} has been committed already", target.string()));
    if (failed) throw Error(kWhere, fmt::format("an earlier write to {} failed", target.string()));
  }
};

AtomicFile::AtomicFile(fs::path target) : state_(std::make_unique<State>()) {
  if (!target.has_filename() || target.filename() == "." || target.filename() == "..")
    throw Error(kWhere, fmt::format("'{}' does not name a file", target.string()));
  struct stat status = {};
  const bool exists = ::lstat(target.c_str(), &status) == 0;
  if (exists && S_ISDIR(status.st_mode))
    throw Error(kWhere, fmt::format("{} is a folder, cannot write a file there", target.string()));
  if (exists && !S_ISREG(status.st_mode) && !S_ISLNK(status.st_mode))
    throw Error(kWhere,
                fmt::format("{} is not a regular file, it will not be replaced", target.string()));
  remove_stale(target);
  state_->target = std::move(target);
  state_->staged = stage(state_->target, StagedKind::file, kWhere);
  state_->owner = ::getpid();
  // A file that was private stays private; failure leaves the default mode.
  if (exists && S_ISREG(status.st_mode) && ::fchmod(state_->staged.fd, status.st_mode & 0777) != 0)
    errno = 0;
}

AtomicFile::~AtomicFile() = default;
AtomicFile::AtomicFile(AtomicFile&& other) noexcept = default;

void AtomicFile::write(const void* data, size_t bytes) {
  State& s = *state_;
  s.check_usable();
  const char* from = static_cast<const char*>(data);
  if (s.buffer.size() + bytes > kBuffer) s.flush();
  if (bytes >= kBuffer)
    s.write_through(from, bytes);
  else
    s.buffer.append(from, bytes);
  s.written += bytes;
}

void AtomicFile::pad(uint64_t count) {
  static constexpr char kZeros[4096] = {};
  while (count > 0) {
    const size_t n = std::min<uint64_t>(count, sizeof(kZeros));
    write(kZeros, n);
    count -= n;
  }
}

uint64_t AtomicFile::written() const {
  return state_->written;
}
const fs::path& AtomicFile::target() const {
  return state_->target;
}

void AtomicFile::commit() {
  State& s = *state_;
  s.check_usable();
  s.flush();
  s.failed = true;  // until everything below has succeeded
  if (::fsync(s.staged.fd) != 0) fail_errno(kWhere, "sync", s.target, errno);
  if (::rename(s.staged.path.c_str(), s.target.c_str()) != 0)
    fail_errno(kWhere, "rename the finished file to", s.target, errno);
  ::close(s.staged.fd);
  s.staged.fd = -1;
  sync_folder(s.target.parent_path(), kWhere);
}

void write_file(const fs::path& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

}  // namespace budwood::io
