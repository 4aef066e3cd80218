#pragma once

#include <budwood/peft/merge.h>

#include <filesystem>
#include <string>
#include <vector>

namespace budwood {

/// What a merge has written so far, kept in its unfinished folder for one that goes on.
class MergeProgress {
 public:
  explicit MergeProgress(const MergeFilesOptions& options);

  /// Sets what a killed merge of the same inputs left aside, before the folder is opened.
  void find();
  /// Moves its whole files into the folder that is written, and returns their names. The report
  /// gets what was reported of them.
  std::vector<std::string> take_over(const std::filesystem::path& folder, MergeFilesReport& report);
  /// Writes down that these files are whole.
  void save(const std::filesystem::path& folder, const std::vector<std::string>& files,
            const MergeFilesReport& report);
  /// Takes the notes out of the finished folder.
  void finish(const std::filesystem::path& folder);

 private:
  const MergeFilesOptions& options_;
  std::string inputs_;
  std::filesystem::path aside_;
  size_t saved_ = 0;
};

}  // namespace budwood
