#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

/// The hidden siblings in which outputs grow before they take their name.
namespace budwood::io {

/// "<folder>/.<name>.tmp-<pid>-<n>", open and locked for as long as its writer lives, so that
/// others can tell it from one that a killed process left behind.
struct Staged {
  std::filesystem::path path;
  int fd = -1;
};

enum class StagedKind { file, folder };

/// Makes a fresh hidden sibling of target. `where` is the function named in errors.
Staged stage(const std::filesystem::path& target, StagedKind kind, std::string_view where);

/// Removes the hidden siblings of target whose writers are gone. Where a kill between two renames
/// left no folder at the target but the old one under a hidden name, puts that back.
void remove_stale(const std::filesystem::path& target);

/// Moves a hidden sibling folder of target whose writer is gone, and that holds a file of this
/// name, to another path; false when there is none.
bool take_stale_folder(const std::filesystem::path& target, const std::string& holds,
                       const std::filesystem::path& to);

/// Whether a file name is one that stage() makes.
bool is_staged_name(std::string_view name);

/// The hidden name for a folder that must stand aside while another takes its name.
std::filesystem::path aside_name(const std::filesystem::path& target);

/// Opens and locks a file or folder; nothing when it is gone or somebody else holds the lock.
std::optional<int> open_locked(const std::filesystem::path& path);

void sync_path(const std::filesystem::path& path, std::string_view where);
/// Syncs the entries of a folder; silent on file systems that cannot.
void sync_folder(const std::filesystem::path& folder, std::string_view where);

/// Throws Error(where, "cannot <action> <path>: <reason of errno>").
[[noreturn]] void fail_errno(std::string_view where, std::string_view action,
                             const std::filesystem::path& path, int error);

}  // namespace budwood::io
