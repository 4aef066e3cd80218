#include <budwood/peft/io/staging.h>
#include <budwood/quant/error.h>
#include <errno.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <charconv>
#include <vector>

namespace budwood::io {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kTmp = ".tmp-";
constexpr std::string_view kOld = ".old-";

fs::path sibling(const fs::path& target, std::string_view tag) {
  static std::atomic<unsigned> counter{0};
  return target.parent_path() /
         fmt::format(".{}{}{}-{}", target.filename().string(), tag, ::getpid(), ++counter);
}

// "<pid>-<n>" -> pid, or nothing when the text is not of that form.
std::optional<pid_t> parse_owner(std::string_view text) {
  pid_t pid = 0;
  unsigned number = 0;
  const char* end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, pid);
  if (first.ec != std::errc() || first.ptr == end || *first.ptr != '-') return std::nullopt;
  const auto second = std::from_chars(first.ptr + 1, end, number);
  if (second.ec != std::errc() || second.ptr != end) return std::nullopt;
  return pid;
}

// Folder to look in when a path has no parent of its own.
fs::path parent_of(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

bool lock_is_free(int fd, pid_t owner) {
  if (::flock(fd, LOCK_EX | LOCK_NB) == 0) return true;
  if (errno == EWOULDBLOCK) return false;
  // No locks on this file system: go by the process that the name states.
  return ::kill(owner, 0) != 0 && errno == ESRCH;
}

}  // namespace

[[noreturn]] void fail_errno(std::string_view where, std::string_view action, const fs::path& path,
                             int error) {
  throw Error(where, fmt::format("cannot {} {}: {}", action, path.string(),
                                 std::generic_category().message(error)));
}

std::optional<int> open_locked(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return std::nullopt;
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    ::close(fd);
    return std::nullopt;
  }
  return fd;
}

Staged stage(const fs::path& target, StagedKind kind, std::string_view where) {
  for (int attempt = 0; attempt < 100; ++attempt) {
    Staged staged{sibling(target, kTmp), -1};
    if (kind == StagedKind::folder) {
      if (::mkdir(staged.path.c_str(), 0777) != 0) {
        if (errno == EEXIST) continue;
        fail_errno(where, "make a folder beside", target, errno);
      }
      staged.fd = ::open(staged.path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    } else {
      staged.fd = ::open(staged.path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (staged.fd < 0 && errno == EEXIST) continue;
    }
    if (staged.fd < 0) fail_errno(where, "make a file beside", target, errno);
    // Somebody who cleans up may have seen the file before the lock was ours; then take another.
    struct stat status = {};
    const bool locked = ::flock(staged.fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK;
    if (locked && ::fstat(staged.fd, &status) == 0 && status.st_nlink > 0 &&
        fs::exists(fs::symlink_status(staged.path)))
      return staged;
    ::close(staged.fd);
  }
  throw Error(where, fmt::format("no free hidden name beside {}", target.string()));
}

bool is_staged_name(std::string_view name) {
  if (name.empty() || name[0] != '.') return false;
  for (const auto tag : {kTmp, kOld}) {
    const auto at = name.rfind(tag);
    if (at != std::string_view::npos && at > 1 && parse_owner(name.substr(at + tag.size())))
      return true;
  }
  return false;
}

fs::path aside_name(const fs::path& target) {
  return sibling(target, kOld);
}

void remove_stale(const fs::path& target) {
  std::error_code ignored;
  const std::string prefix = "." + target.filename().string();
  std::vector<fs::path> found;
  for (fs::directory_iterator it(parent_of(target), ignored), end; !ignored && it != end;
       it.increment(ignored))
    if (it->path().filename().string().starts_with(prefix)) found.push_back(it->path());
  for (const auto& path : found) {
    const std::string name = path.filename().string();
    const std::string_view rest = std::string_view(name).substr(prefix.size());
    const bool old = rest.starts_with(kOld);
    if (!old && !rest.starts_with(kTmp)) continue;
    const auto owner = parse_owner(rest.substr(kTmp.size()));
    if (!owner) continue;
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) continue;
    if (lock_is_free(fd, *owner)) {
      if (old && !fs::exists(fs::symlink_status(target, ignored)))
        ::rename(path.c_str(), target.c_str());
      else
        fs::remove_all(path, ignored);
    }
    ::close(fd);
  }
}

bool take_stale_folder(const fs::path& target, const std::string& holds, const fs::path& to) {
  std::error_code ignored;
  const std::string prefix = fmt::format(".{}{}", target.filename().string(), kTmp);
  for (fs::directory_iterator it(parent_of(target), ignored), end; !ignored && it != end;
       it.increment(ignored)) {
    const std::string name = it->path().filename().string();
    if (!name.starts_with(prefix) || !fs::exists(it->path() / holds, ignored)) continue;
    const auto owner = parse_owner(std::string_view(name).substr(prefix.size()));
    if (!owner) continue;
    const int fd = ::open(it->path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) continue;
    const bool taken = lock_is_free(fd, *owner) && ::rename(it->path().c_str(), to.c_str()) == 0;
    ::close(fd);
    if (taken) return true;
  }
  return false;
}

void sync_path(const fs::path& path, std::string_view where) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0) fail_errno(where, "open", path, errno);
  const int result = ::fsync(fd), error = errno;
  ::close(fd);
  if (result != 0 && error != EINVAL && error != ENOTSUP && error != EROFS)
    fail_errno(where, "sync", path, error);
}

void sync_folder(const fs::path& folder, std::string_view where) {
  sync_path(folder.empty() ? fs::path(".") : folder, where);
}

}  // namespace budwood::io
