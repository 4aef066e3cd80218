#include <budwood/peft/io/text.h>
#include <budwood/peft/kernels/fold.h>
#include <budwood/peft/merge/output_rows.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>

namespace budwood {
namespace {

using kernels::FloatType;

// Numbers of a panel: 0.5 MB in fp64, which stays in the second cache.
constexpr int64_t kPanelElements = int64_t{1} << 16;
// Bytes of a copy that are read at a time.
constexpr int64_t kCopiedBytes = int64_t{1} << 20;

std::optional<FloatType> float_type(io::Dtype dtype) {
  switch (dtype) {
    case io::Dtype::f32:
      return FloatType::fp32;
    case io::Dtype::bf16:
      return FloatType::bf16;
    case io::Dtype::f16:
      return FloatType::fp16;
    default:
      return {};
  }
}

}  // namespace

kernels::FoldSums sums_of(const OutputRows::Values& values, const std::vector<double>& written) {
  return kernels::sums_of(values.before.data(), values.after.data(), written.data(),
                          static_cast<int64_t>(written.size()));
}

OutputRows::OutputRows(const MergePlan& plan, const MergeOutput& output, bool whole_rows)
    : plan_(plan), output_(output), whole_rows_(whole_rows) {
  const auto& shape = output.spec.shape;
  const auto count = static_cast<int64_t>(*io::element_count(shape));
  if (is_copy()) {  // bytes
    rows_ = static_cast<int64_t>(output.spec.bytes());
    cols_ = 1;
    step_ = kCopiedBytes;
    return;
  }
  const bool is_packed = output.whole == nullptr && plan.base->packed(*output.source);
  const bool flat = output.edits.empty() && output.rows.empty() && !is_packed && !whole_rows;
  // A vector that is changed or packed is one row.
  rows_ = count == 0 || flat ? count : shape.size() < 2 ? 1 : shape[0];
  const bool stack = shape.size() == 3 && !output.edits.empty();
  if (stack) {
    experts_ = shape[0];
    rows_ = shape[0] * shape[1];
  }
  folding_.resize(static_cast<size_t>(experts_));
  cols_ = rows_ == 0 ? 0 : count / rows_;
  step_ = std::max<int64_t>(1, kPanelElements / std::max<int64_t>(1, cols_));
}

bool OutputRows::is_copy() const {
  if (whole_rows_) return false;
  if (!output_.edits.empty() || !output_.rows.empty()) return false;
  if (output_.whole == nullptr && plan_.base->packed(*output_.source)) return false;
  return stored().dtype == output_.spec.dtype;
}

void OutputRows::done() {
  folding_.clear();
  folding_.resize(static_cast<size_t>(experts_));
  packed_.reset();
  trained_.reset();
  rescaled_.reset();
}

std::vector<std::byte> OutputRows::copied(int64_t panel) const {
  const int64_t begin = panel * step_;
  std::vector<std::byte> bytes;
  read(begin, std::min(step_, rows_ - begin), bytes);
  return bytes;
}

void OutputRows::require_floats() const {
  if (!float_type(stored().dtype) || !float_type(output_.spec.dtype))
    throw Error(
        "merge_files",
        fmt::format("{} is {}, which is not converted to {}", io::in_quotes(output_.spec.name),
                    io::dtype_name(stored().dtype), io::dtype_name(output_.spec.dtype)));
}

// Rows as they are stored to what the adapters make of them.
void OutputRows::change(double* values, int64_t begin, int64_t rows) {
  if (output_.bias)
    folding().apply_to_bias(values, cols_);
  else if (!output_.edits.empty())
    fold(values, begin, rows);
  replace_rows(values, begin, rows);
}

bool OutputRows::is_direct() const {
  const bool packed = output_.whole == nullptr && plan_.base->packed(*output_.source);
  return !packed && !output_.rescaled && plan_.trained == nullptr;
}

std::vector<std::byte> OutputRows::make_rounded(int64_t panel, kernels::FoldSums& sums) {
  const int64_t begin = panel * step_, rows = std::min(step_, rows_ - begin), count = rows * cols_;
  require_floats();
  const auto from = *float_type(stored().dtype), to = *float_type(output_.spec.dtype);
  thread_local std::vector<std::byte> raw;
  thread_local std::vector<double> values;
  read(begin, rows, raw);
  values.resize(static_cast<size_t>(count));
  kernels::widen(from, raw.data(), values.data(), count);
  change(values.data(), begin, rows);
  std::vector<std::byte> bytes(static_cast<size_t>(count * quant::kernels::float_bytes(to)));
  if (!kernels::round_and_sum(from, raw.data(), values.data(), to, bytes.data(), count, sums))
    refuse(panel);
  return bytes;
}

void OutputRows::make(int64_t panel, Values& values) {
  const int64_t begin = panel * step_, rows = std::min(step_, rows_ - begin);
  require_floats();
  wide(begin, rows, values.before);
  if (!rescale(begin, rows, values.after)) values.after = values.before;
  change(values.after.data(), begin, rows);
  values.trained.clear();
  if (plan_.trained == nullptr || output_.edits.empty() || output_.bias) return;
  const auto* tensor = plan_.trained->find(output_.spec.name);
  if (tensor == nullptr || !plan_.trained->packed(*tensor)) return;
  widen_packed(*plan_.trained, *tensor, trained_, begin, rows, values.trained);
  for (size_t i = 0; i < values.trained.size(); ++i)
    values.trained[i] += values.after[i] - values.before[i];
}

std::vector<std::byte> OutputRows::rounded(const std::vector<double>& after, int64_t panel) const {
  const auto type = *float_type(output_.spec.dtype);
  std::vector<std::byte> bytes(after.size() *
                               static_cast<size_t>(quant::kernels::float_bytes(type)));
  if (!kernels::round_once(after.data(), type, bytes.data(), static_cast<int64_t>(after.size())))
    refuse(panel);
  return bytes;
}

void OutputRows::refuse(int64_t panel) const {
  throw Error(
      "merge_files",
      fmt::format("{}: rows {} to {} hold values that are not finite in {}; nothing was "
                  "written",
                  io::in_quotes(output_.spec.name), panel * step_,
                  std::min(rows_, (panel + 1) * step_), io::dtype_name(output_.spec.dtype)));
}

void OutputRows::widen(const std::vector<std::byte>& bytes, std::vector<double>& values) const {
  const auto type = *float_type(output_.spec.dtype);
  values.resize(bytes.size() / static_cast<size_t>(quant::kernels::float_bytes(type)));
  kernels::widen(type, bytes.data(), values.data(), static_cast<int64_t>(values.size()));
}

std::pair<uint64_t, uint64_t> OutputRows::extent(int64_t panel) const {
  const uint64_t row_bytes = output_.spec.bytes() / static_cast<uint64_t>(rows_);
  const int64_t begin = panel * step_, rows = std::min(step_, rows_ - begin);
  return {static_cast<uint64_t>(begin) * row_bytes, static_cast<uint64_t>(rows) * row_bytes};
}

void OutputRows::read(int64_t begin, int64_t rows, std::vector<std::byte>& bytes) const {
  const uint64_t row_bytes = stored().bytes() / static_cast<uint64_t>(rows_);
  bytes.resize(static_cast<size_t>(rows) * row_bytes);
  const uint64_t at = static_cast<uint64_t>(begin) * row_bytes;
  if (output_.whole != nullptr)
    std::memcpy(bytes.data(), stored().data + at, bytes.size());
  else
    plan_.base->read(stored(), at, bytes.data(), bytes.size());
}

void OutputRows::widen_packed(const MergeBase& base, const io::TensorInfo& tensor,
                              std::unique_ptr<PackedRows>& opened, int64_t begin, int64_t rows,
                              std::vector<double>& values) {
  {
    const std::lock_guard lock(opening_);
    if (!opened) opened = base.open(tensor);
  }
  thread_local std::vector<float> floats;
  floats.resize(static_cast<size_t>(rows * cols_));
  opened->read(begin, rows, floats.data());
  values.assign(floats.begin(), floats.end());
}

void OutputRows::wide(int64_t begin, int64_t rows, std::vector<double>& values) {
  if (output_.whole == nullptr && plan_.base->packed(*output_.source))
    return widen_packed(*plan_.base, *output_.source, packed_, begin, rows, values);
  thread_local std::vector<std::byte> bytes;
  read(begin, rows, bytes);
  values.resize(static_cast<size_t>(rows * cols_));
  kernels::widen(*float_type(stored().dtype), bytes.data(), values.data(), rows * cols_);
}

// The rows under other scales, where an edit has some.
bool OutputRows::rescale(int64_t begin, int64_t rows, std::vector<double>& values) {
  if (!output_.rescaled || output_.edits.empty()) return false;
  {
    const std::lock_guard lock(opening_);
    if (!rescaled_) {
      const auto& edit = output_.edits[0];
      rescaled_ =
          plan_.base->open_rescaled(*output_.source, edit.term(output_.spec.shape), edit.weight);
    }
  }
  std::vector<float> floats(static_cast<size_t>(rows * cols_));
  rescaled_->read(begin, rows, floats.data());
  values.assign(floats.begin(), floats.end());
  return true;
}

// Rows of one expert after the other.
void OutputRows::fold(double* values, int64_t begin, int64_t rows) {
  const int64_t each = rows_ / experts_;
  for (int64_t row = begin; row < begin + rows;) {
    const int64_t expert = row / each, first = row % each;
    const int64_t count = std::min(each - first, begin + rows - row);
    folding(expert).apply(values + (row - begin) * cols_, first, count);
    row += count;
  }
}

const Folding& OutputRows::folding(int64_t expert) {
  const std::lock_guard lock(mutex_);
  auto& folding = folding_[static_cast<size_t>(expert)];
  if (folding) return *folding;
  std::vector<WeightedTerm> terms;
  for (const auto& edit : output_.edits)
    terms.push_back({edit.term(output_.spec.shape, expert), edit.weight});
  const auto panels = [&](const std::function<void(double*, int64_t, int64_t)>& use) {
    std::vector<double> values;
    for (int64_t begin = 0; begin < rows_; begin += step_) {
      const int64_t rows = std::min(step_, rows_ - begin);
      wide(begin, rows, values);
      use(values.data(), begin, rows);
    }
  };
  folding = std::make_unique<Folding>(std::move(terms), output_.transposed, cols_, panels);
  return *folding;
}

void OutputRows::replace_rows(double* values, int64_t begin, int64_t rows) const {
  for (const auto& [ids, tensor] : output_.rows) {
    const auto fresh = float_array(*tensor);
    for (size_t i = 0; i < ids.size(); ++i)
      if (ids[i] >= begin && ids[i] < begin + rows)
        std::copy_n(fresh.values.data() + static_cast<int64_t>(i) * cols_, cols_,
                    values + (ids[i] - begin) * cols_);
  }
}

}  // namespace budwood
