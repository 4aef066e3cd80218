#pragma once

#include <budwood/peft/kernels/fold.h>
#include <budwood/peft/merge/fold_panel.h>
#include <budwood/peft/merge/merge_plan.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace budwood {

/// One output of a plan, made in panels of rows of 0.5 MB in fp64. From several threads.
class OutputRows {
 public:
  /// `whole_rows`: also of what is only copied or converted, which is cut anywhere otherwise.
  OutputRows(const MergePlan& plan, const MergeOutput& output, bool whole_rows = false);

  int64_t panels() const { return (rows_ + step_ - 1) / step_; }
  /// Whether the output is the stored tensor byte for byte.
  bool is_copy() const;
  /// A panel of a copy.
  std::vector<std::byte> copied(int64_t panel) const;

  struct Values {
    std::vector<double> before, after;  ///< as stored, and with the adapters; rows by columns
    std::vector<double> trained;        ///< of plan.trained, with the same change; or empty
  };
  /// A panel of what is no copy, into room that is used again. Throws for types that are not
  /// converted.
  void make(int64_t panel, Values& values);
  /// `after` in the output's dtype, each number rounded once. Throws when one is not finite.
  std::vector<std::byte> rounded(const std::vector<double>& after, int64_t panel) const;
  /// Whether the output is made of plain numbers, and nothing is compared with what was trained:
  /// then the next is make() and rounded() at once, with the sums of the panel, in less memory.
  bool is_direct() const;
  std::vector<std::byte> make_rounded(int64_t panel, kernels::FoldSums& sums);
  /// Bytes of this output's dtype as fp64.
  void widen(const std::vector<std::byte>& bytes, std::vector<double>& values) const;
  /// First byte and bytes of a panel in the output's dtype.
  std::pair<uint64_t, uint64_t> extent(int64_t panel) const;
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  /// Panels begin at multiples of so many rows.
  void align(int64_t rows) { step_ = std::max(rows, step_ / rows * rows); }
  /// Lets go of the factors and of what is packed.
  void done();

 private:
  const io::TensorInfo& stored() const {
    return output_.whole != nullptr ? *output_.whole : *output_.source;
  }
  void read(int64_t begin, int64_t rows, std::vector<std::byte>& bytes) const;
  void wide(int64_t begin, int64_t rows, std::vector<double>& values);
  void widen_packed(const MergeBase& base, const io::TensorInfo& tensor,
                    std::unique_ptr<PackedRows>& opened, int64_t begin, int64_t rows,
                    std::vector<double>& values);
  const Folding& folding(int64_t expert = 0);
  void change(double* values, int64_t begin, int64_t rows);
  void fold(double* values, int64_t begin, int64_t rows);
  void require_floats() const;
  bool rescale(int64_t begin, int64_t rows, std::vector<double>& values);
  [[noreturn]] void refuse(int64_t panel) const;
  void replace_rows(double* values, int64_t begin, int64_t rows) const;

  const MergePlan& plan_;
  const MergeOutput& output_;
  bool whole_rows_;
  int64_t rows_ = 0, cols_ = 0, step_ = 1;
  std::mutex mutex_;
  int64_t experts_ = 1;  // matrices in the tensor, one below the other
  std::vector<std::unique_ptr<Folding>> folding_;
  std::mutex opening_;
  std::unique_ptr<PackedRows> packed_, trained_, rescaled_;
};

/// Of a panel, `written` being its rounded values.
kernels::FoldSums sums_of(const OutputRows::Values& values, const std::vector<double>& written);

}  // namespace budwood
