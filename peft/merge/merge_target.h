#pragma once

#include <budwood/peft/merge/merge_plan.h>
#include <budwood/peft/merge/output_rows.h>

#include <cstddef>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace budwood {

/// Bytes that are written, and what rounding made of the numbers in them.
struct MergePiece {
  std::vector<std::byte> bytes;
  kernels::FoldSums sums;
  double distance = 0;  ///< sum of squares to what was trained
};

/// One tensor of the files, made piece by piece on several threads.
class MergeItem {
 public:
  explicit MergeItem(const MergeOutput& output) : output_(output) {}
  virtual ~MergeItem() = default;
  const MergeOutput& output() const { return output_; }
  virtual int64_t pieces() const = 0;
  virtual MergePiece make(int64_t piece) = 0;
  /// Whether sums of its pieces are those of the output.
  virtual bool counts() const { return true; }
  /// All pieces are made.
  virtual void done() {}

 private:
  const MergeOutput& output_;
};

/// The files of a merged model while they are written.
class MergeTarget {
 public:
  virtual ~MergeTarget() = default;
  /// In the order in which they are to be written.
  const std::vector<std::unique_ptr<MergeItem>>& items() const { return items_; }
  /// The next bytes of an item.
  virtual void write(size_t item, const std::vector<std::byte>& bytes) = 0;
  /// Throws when bytes are missing; else finishes the files.
  virtual void commit() = 0;
  /// Names of the files, and of those of them that are whole already.
  virtual std::vector<std::string> files() const = 0;
  virtual std::vector<std::string> finished() const { return {}; }
  /// Bytes of all weights.
  virtual uint64_t bytes() const = 0;
  /// quantization_config of the folder, as JSON; empty = plain.
  virtual std::string quantization() const { return {}; }
  virtual std::vector<std::string> warnings() const { return {}; }

 protected:
  std::vector<std::unique_ptr<MergeItem>> items_;
};

/// A tensor of plain numbers, by panels of rows.
class PlainItem final : public MergeItem {
 public:
  PlainItem(const MergePlan& plan, const MergeOutput& output)
      : MergeItem(output), rows_(plan, output) {}
  int64_t pieces() const override { return rows_.panels(); }
  MergePiece make(int64_t piece) override;
  void done() override { rows_.done(); }

 private:
  OutputRows rows_;
};

/// The sums of a panel, `written` being its values as they are read from the file.
void add_sums(MergePiece& piece, const OutputRows::Values& values,
              const std::vector<double>& written);

/// Where and how files are made.
struct MergePlace {
  std::filesystem::path path;  ///< the folder they go into, or the file
  uint64_t max_shard_size = 0;
  std::vector<std::string> present = {};  ///< files that are there already
};

using MergeTargetFactory = std::function<std::unique_ptr<MergeTarget>(
    const MergePlan& plan, const MergeFilesOptions& options, const MergePlace& place)>;
/// Adds a kind of files; called from a static object in its own source file. There are "folder",
/// "gguf" and "requantised", a folder of codes.
bool register_merge_target(const std::string& kind, MergeTargetFactory factory);
std::unique_ptr<MergeTarget> open_merge_target(const std::string& kind, const MergePlan& plan,
                                               const MergeFilesOptions& options,
                                               const MergePlace& place);

}  // namespace budwood
