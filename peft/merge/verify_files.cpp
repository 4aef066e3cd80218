#include <budwood/peft/io/text.h>
#include <budwood/peft/merge.h>
#include <budwood/peft/merge/output_rows.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

namespace budwood {
namespace {

// The largest magnitude that a value takes part in.
std::vector<double> reach_of(const OutputRows::Values& values) {
  std::vector<double> reach(values.after.size());
  for (size_t i = 0; i < reach.size(); ++i) {
    const double before = values.before[i], after = values.after[i];
    reach[i] = std::max({std::abs(before), std::abs(after), std::abs(after - before)});
  }
  return reach;
}

// Adds to `verified` how values stand to exact ones, given the steps between neighbours at them.
void measure(VerifiedTensor& verified, const std::vector<double>& written,
             const std::vector<double>& exact, const std::vector<double>& steps) {
  for (size_t i = 0; i < written.size(); ++i) {
    if (written[i] == exact[i]) continue;
    const double away = std::abs(written[i] - exact[i]) / steps[i];
    verified.steps = away <= verified.steps ? verified.steps : away;  // NaN stays
  }
}

void judge(VerifiedTensor& verified, const kernels::FoldSums& sums) {
  verified.delta_norm = std::sqrt(sums.delta);
  if (sums.delta == 0) return;
  verified.survival = sums.left / sums.delta;
  verified.error = std::sqrt(sums.error / sums.delta);
}

// A tensor of the merged model that is held as blocks or codes.
VerifiedTensor compare_packed(const MergePlan& plan, const MergeOutput& output,
                              const PackedRows& merged) {
  VerifiedTensor verified{.name = output.spec.name};
  OutputRows rows(plan, output, /*whole_rows=*/true);
  kernels::FoldSums sums;
  OutputRows::Values values;
  std::vector<float> read;
  int64_t begin = 0;
  for (int64_t panel = 0; panel < rows.panels(); ++panel) {
    rows.make(panel, values);
    const auto count = static_cast<int64_t>(values.after.size()) / rows.cols();
    read.resize(values.after.size());
    merged.read(begin, count, read.data());
    const std::vector<double> written(read.begin(), read.end());
    measure(verified, written, values.after,
            steps_of(merged.levels(), read, reach_of(values), rows.cols()));
    sums.add(sums_of(values, written));
    auto& wanted = values.after;
    for (int64_t row = 0; row < count; ++row) {
      double* first = wanted.data() + row * rows.cols();
      if (!merged.round(first, rows.cols()))
        std::transform(first, first + rows.cols(), first, [](double v) { return float(v); });
    }
    verified.equal &= wanted == written;
    begin += count;
  }
  judge(verified, sums);
  return verified;
}

VerifiedTensor compare(const MergePlan& plan, const MergeOutput& output, const MergeBase& merged,
                       const io::TensorInfo& found) {
  if (merged.packed(found)) return compare_packed(plan, output, *merged.open(found));
  VerifiedTensor verified{.name = output.spec.name};
  OutputRows rows(plan, output);
  kernels::FoldSums sums;
  OutputRows::Values values;
  std::vector<double> written;
  for (int64_t panel = 0; panel < rows.panels(); ++panel) {
    const auto [begin, count] = rows.extent(panel);
    std::vector<std::byte> bytes(count);
    merged.read(found, begin, bytes.data(), bytes.size());
    if (rows.is_copy()) {
      verified.equal &= bytes == rows.copied(panel);
      continue;
    }
    rows.make(panel, values);
    verified.equal &= bytes == rows.rounded(values.after, panel);
    rows.widen(bytes, written);
    sums.add(sums_of(values, written));
    const auto reach = reach_of(values);
    std::vector<double> steps(reach.size());
    std::ranges::transform(reach, steps.begin(),
                           [&](double value) { return step_at(value, output.spec.dtype); });
    measure(verified, written, values.after, steps);
  }
  if (rows.is_copy() && !verified.equal) verified.steps = HUGE_VAL;
  judge(verified, sums);
  return verified;
}

}  // namespace

VerifyFilesReport verify_files(const MergeFilesOptions& options) {
  if (const auto why = why_not_streamed(options)) throw Error("verify_files", *why);
  MergePlan plan(options);
  const auto merged = open_merge_base(options.out);
  VerifyFilesReport report;
  std::set<std::string> wanted;
  for (auto& output : plan.outputs) {
    wanted.insert(output.spec.name);
    const auto* found = merged->find(output.spec.name);
    if (found == nullptr) {
      report.faults.push_back(fmt::format("{} is missing", output.spec.name));
      continue;
    }
    if (found->shape != output.spec.shape) {
      report.faults.push_back(fmt::format("{} is {}, {} is wanted", output.spec.name,
                                          io::shape_text(found->shape),
                                          io::shape_text(output.spec.shape)));
      continue;
    }
    // Files of another dtype are judged by their own rounding.
    output.spec.dtype = found->dtype;
    report.tensors.push_back(compare(plan, output, *merged, *found));
  }
  for (const auto* tensor : merged->tensors())
    if (!wanted.contains(tensor->name))
      report.faults.push_back(fmt::format("{} is not of this merge", tensor->name));
  return report;
}

bool VerifyFilesReport::passed(double steps) const {
  const auto holds = [&](const auto& tensor) { return tensor.equal || tensor.steps <= steps; };
  return faults.empty() && std::all_of(tensors.begin(), tensors.end(), holds);
}

std::string VerifyFilesReport::to_json(double steps) const {
  nlohmann::ordered_json json;
  json["passed"] = passed(steps);
  json["tolerance"] = steps;
  json["faults"] = faults;
  json["tensors"] = nlohmann::ordered_json::array();
  for (const auto& tensor : tensors) {
    nlohmann::ordered_json one = {{"name", tensor.name},
                                  {"equal", tensor.equal},
                                  {"delta_norm", tensor.delta_norm},
                                  {"survival", tensor.survival},
                                  {"error", tensor.error}};
    // JSON has no infinity.
    one["steps"] = std::isfinite(tensor.steps) ? nlohmann::ordered_json(tensor.steps) : nullptr;
    json["tensors"].push_back(std::move(one));
  }
  return json.dump(2) + "\n";
}

}  // namespace budwood
