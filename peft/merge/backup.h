#pragma once

#include <budwood/peft/io/safetensors.h>
#include <budwood/peft/merge/merge_plan.h>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace budwood {

/// Writes what a plan changes, as it was, into the merged folder.
void write_backup(const MergePlan& plan, const std::filesystem::path& folder);

/// What a merged folder was before.
struct MergeBackup {
  io::SafetensorsFile tensors;
  std::string config;              ///< config.json's text; empty when there was none
  std::vector<std::string> added;  ///< tensors that the merge made
};
/// Nothing when a folder has no backup.
std::optional<MergeBackup> read_backup(const std::filesystem::path& folder);

}  // namespace budwood
