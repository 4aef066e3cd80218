#include <budwood/peft/io/file.h>
#include <budwood/peft/io/staging.h>
#include <budwood/quant/error.h>
#include <errno.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

namespace budwood::io {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kWhere = "AtomicFolder";

// std::filesystem's own exceptions as Error.
template <typename F>
auto as_error(F&& body) {
  try {
    return body();
  } catch (const fs::filesystem_error& e) {
    throw Error(kWhere, e.what());
  }
}

// The target as "<real parent>/<name>", so that a later change of directory does not move it.
fs::path settle(fs::path target) {
  if (target.empty()) throw Error(kWhere, "the name of the folder is empty");
  if (!target.has_filename()) target = target.parent_path();
  const auto name = target.filename();
  if (name.empty() || name == "." || name == "..") target = fs::canonical(target);
  target = fs::absolute(target);
  if (!target.has_filename())
    throw Error(kWhere, fmt::format("{} cannot be written as a folder", target.string()));
  std::error_code error;
  fs::create_directories(target.parent_path(), error);
  if (error) fail_errno(kWhere, "make the folder", target.parent_path(), error.value());
  target = fs::canonical(target.parent_path()) / target.filename();
  const fs::path here = fs::current_path(error);
  const auto [in_target, in_here] =
      std::mismatch(target.begin(), target.end(), here.begin(), here.end());
  if (!error && in_target == target.end())
    throw Error(kWhere, fmt::format("{} is or holds the current directory and cannot be replaced; "
                                    "write to a folder inside it",
                                    target.string()));
  return target;
}

// Adds to `fresh` what only `old` has: files by hard link, or by copy where links are refused.
void carry_over(const fs::path& old, const fs::path& fresh) {
  for (const auto& entry : fs::directory_iterator(old)) {
    const fs::path to = fresh / entry.path().filename();
    if (is_staged_name(entry.path().filename().string())) continue;
    const auto status = entry.symlink_status();
    const auto present = fs::symlink_status(to);
    if (fs::is_directory(status)) {
      if (!fs::exists(present)) fs::create_directory(to, entry.path());
      if (fs::is_directory(fs::symlink_status(to))) carry_over(entry.path(), to);
    } else if (!fs::exists(present)) {
      std::error_code error;
      if (fs::is_symlink(status))
        fs::copy_symlink(entry.path(), to, error);
      else if (fs::is_regular_file(status))
        fs::create_hard_link(entry.path(), to, error);
      else
        error = std::make_error_code(std::errc::invalid_argument);
      if (error && fs::is_regular_file(status)) fs::copy_file(entry.path(), to, error);
      if (error) fail_errno(kWhere, "carry over", entry.path(), error.value());
    }
  }
}

void sync_tree(const fs::path& folder) {
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const auto status = entry.symlink_status();
    if (fs::is_regular_file(status) || fs::is_directory(status)) sync_path(entry.path(), kWhere);
  }
  sync_path(folder, kWhere);
}

bool lacks_flag(int error) {
  return error == EINVAL || error == ENOSYS || error == ENOTSUP;
}

// renameat2 with flags that some file systems lack; then plain renames in the closest order.
void rename_fresh(const fs::path& from, const fs::path& target) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, target.c_str(), RENAME_NOREPLACE) == 0) return;
  int error = errno;
  if (lacks_flag(error)) {
    error = fs::exists(fs::symlink_status(target)) ? EEXIST : 0;
    if (error == 0 && ::rename(from.c_str(), target.c_str()) == 0) return;
    if (error == 0) error = errno;
  }
  if (error == EEXIST) throw Error(kWhere, fmt::format("{} exists already", target.string()));
  fail_errno(kWhere, "rename the finished folder to", target, error);
}

void remove_old(const fs::path& path) {
  std::error_code ignored;  // what stays is removed by the next writer of the same target
  fs::remove_all(path, ignored);
}

void exchange(const fs::path& from, const fs::path& target) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) == 0) {
    sync_folder(target.parent_path(), kWhere);
    remove_old(from);
    return;
  }
  if (!lacks_flag(errno)) fail_errno(kWhere, "exchange the finished folder with", target, errno);
  const fs::path aside = aside_name(target);
  // The lock keeps other writers from putting the old folder back between the two renames.
  const auto lock = open_locked(target);
  if (::rename(target.c_str(), aside.c_str()) != 0) {
    const int error = errno;
    if (lock) ::close(*lock);
    fail_errno(kWhere, "move aside", target, error);
  }
  if (::rename(from.c_str(), target.c_str()) != 0) {
    const int error = errno;
    ::rename(aside.c_str(), target.c_str());
    if (lock) ::close(*lock);
    fail_errno(kWhere, "rename the finished folder to", target, error);
  }
  sync_folder(target.parent_path(), kWhere);
  remove_old(aside);
  if (lock) ::close(*lock);
}

}  // namespace

struct AtomicFolder::State {
  fs::path target;
  Existing existing = Existing::refuse;
  Staged staged;
  pid_t owner = 0;
  bool committed = false;

  ~State() {
    if (staged.fd < 0) return;
    if (!committed && ::getpid() == owner) remove_old(staged.path);
    ::close(staged.fd);
  }
};

AtomicFolder::AtomicFolder(fs::path target, Existing existing) : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.target = as_error([&] { return settle(std::move(target)); });
  s.existing = existing;
  remove_stale(s.target);
  const auto status = fs::symlink_status(s.target);
  if (fs::exists(status)) {
    if (existing == Existing::refuse)
      throw Error(kWhere, fmt::format("{} exists already", s.target.string()));
    if (!fs::is_directory(status) && !fs::is_directory(fs::status(s.target)))
      throw Error(kWhere,
                  fmt::format("{} is not a folder, it will not be replaced", s.target.string()));
  }
  s.staged = stage(s.target, StagedKind::folder, kWhere);
  s.owner = ::getpid();
}

AtomicFolder::~AtomicFolder() = default;
AtomicFolder::AtomicFolder(AtomicFolder&& other) noexcept = default;

const fs::path& AtomicFolder::path() const {
  return state_->staged.path;
}
const fs::path& AtomicFolder::target() const {
  return state_->target;
}

void AtomicFolder::commit() {
  State& s = *state_;
  if (s.committed)
    throw Error(kWhere, fmt::format("{} has been committed already", s.target.string()));
  const bool present = fs::exists(fs::symlink_status(s.target));
  if (present && s.existing == Existing::keep_others)
    as_error([&] { carry_over(s.target, s.staged.path); });
  struct stat status = {};
  if (present && ::stat(s.target.c_str(), &status) == 0 && (status.st_mode & 0700) == 0700 &&
      ::chmod(s.staged.path.c_str(), status.st_mode & 0777) != 0)
    errno = 0;  // the default mode will do
  as_error([&] { sync_tree(s.staged.path); });
  if (present && s.existing != Existing::refuse)
    exchange(s.staged.path, s.target);
  else
    rename_fresh(s.staged.path, s.target);
  s.committed = true;
  sync_folder(s.target.parent_path(), kWhere);
}

}  // namespace budwood::io
