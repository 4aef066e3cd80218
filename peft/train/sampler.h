#pragma once

#include <budwood/peft/models/batch.h>
#include <budwood/peft/train/data.h>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace budwood::train {

/// How rows become sequences. A sequence of n inputs has n labels: label i is the token after input
/// i, so the last token of a row is only ever a label.
struct SampleOptions {
  int64_t sequence_length = 512;  ///< inputs of a window, at most
  int64_t batch_size = 8;         ///< windows of a batch
  /// "concat": rows end to end with nothing between, cut into windows; each window is one sequence.
  /// For plain text. "pack": whole rows share a window as sequences of their own, none sees
  /// another; windows are filled by best fit. "none": one row for each window.
  std::string packing = "pack";
  /// Rows longer than a window under "pack" and "none": "truncate" keeps the beginning, "split"
  /// makes sequences of the pieces, each label in exactly one of them.
  std::string long_rows = "truncate";
  bool shuffle = true;  ///< a new order of windows in every epoch
  uint64_t seed = 0;

  /// Throws Error with field, value and wanted range.
  void validate() const;
};

/// Sequences for one forward.
struct Batch {
  models::TokenBatch tokens;
  at::Tensor labels;    ///< int64 [tokens], already shifted, -100 = ignored
  int64_t counted = 0;  ///< labels that are not ignored, at least 1
};

/// What became of the rows.
struct SampleReport {
  int64_t rows = 0;
  int64_t skipped_rows = 0;    ///< without a counted label (after truncation)
  int64_t truncated_rows = 0;  ///< longer than a window, cut
  int64_t dropped_tokens = 0;  ///< cut off by truncation
  int64_t split_rows = 0;      ///< longer than a window, in pieces
  int64_t windows = 0;         ///< of an epoch
  int64_t sequences = 0;
  int64_t tokens = 0;   ///< inputs of an epoch
  int64_t counted = 0;  ///< counted labels of an epoch
  int64_t longest = 0;  ///< inputs of the longest sequence

  /// Lines for a person.
  std::string summary() const;
};

/// A position in the data: `batch` batches of `epoch` have been used.
struct SamplePosition {
  int64_t epoch = 0;
  int64_t batch = 0;
};

/// Endless batches over a dataset, epoch after epoch. Every batch is a function of data, options
/// and position alone, so that a restored position gives exactly the same batches again.
class Sampler {
 public:
  /// Throws when no row has a counted label.
  Sampler(std::shared_ptr<const Dataset> data, SampleOptions options);

  const SampleOptions& options() const { return options_; }
  const SampleReport& report() const { return report_; }
  /// Batches of one epoch; the last may have fewer windows.
  int64_t batches() const;

  /// The next batch; behind the last of an epoch follows the first of the next.
  Batch next();
  /// Where next() stands. The end of an epoch is told as the start of the next.
  SamplePosition state() const { return position_; }
  void restore(SamplePosition position);

 private:
  struct Piece {
    int64_t row = 0;     // first row
    int64_t begin = 0;   // first input in it
    int64_t length = 0;  // inputs; in "concat" they may run on into the rows that follow
  };
  void plan_concat();
  void plan_rows();
  void best_fit(std::vector<Piece> pieces);
  void add_window(const Piece* pieces, size_t count);
  void append(const Piece& piece, int64_t* ids, int64_t* labels, int64_t* positions) const;
  const std::vector<int64_t>& order();

  std::shared_ptr<const Dataset> data_;
  SampleOptions options_;
  SampleReport report_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> windows_{0};  // window w has pieces [windows_[w], windows_[w + 1])
  SamplePosition position_;
  std::vector<int64_t> order_;
  int64_t order_epoch_ = -1;
};

}  // namespace budwood::train
