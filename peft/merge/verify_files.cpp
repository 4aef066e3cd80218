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

// The distance between neighbours of a dtype at a value.
double step_at(double value, io::Dtype dtype) {
  const int digits = dtype == io::Dtype::f32 ? 23 : dtype == io::Dtype::bf16 ? 7 : 10;
  const int smallest = dtype == io::Dtype::f16 ? -14 : -126;
  return std::ldexp(1.0, std::max(value > 0 ? std::ilogb(value) : smallest, smallest) - digits);
}

VerifiedTensor compare(const MergePlan& plan, const MergeOutput& output,
                       const io::ModelFiles& merged, const io::TensorInfo& found) {
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
    for (size_t i = 0; i < written.size(); ++i) {
      const double before = values.before[i], after = values.after[i];
      const double largest =
          std::max({std::abs(before), std::abs(after), std::abs(after - before)});
      const double away = std::abs(written[i] - after) / step_at(largest, output.spec.dtype);
      verified.steps = away <= verified.steps ? verified.steps : away;  // NaN stays
    }
  }
  if (rows.is_copy() && !verified.equal) verified.steps = HUGE_VAL;
  verified.delta_norm = std::sqrt(sums.delta);
  if (sums.delta > 0) {
    verified.survival = sums.left / sums.delta;
    verified.error = std::sqrt(sums.error / sums.delta);
  }
  return verified;
}

}  // namespace

VerifyFilesReport verify_files(const MergeFilesOptions& options) {
  if (const auto why = why_not_streamed(options)) throw Error("verify_files", *why);
  MergePlan plan(options);
  const auto merged = io::ModelFiles::open(options.out, io::Access::headers);
  VerifyFilesReport report;
  std::set<std::string> wanted;
  for (auto& output : plan.outputs) {
    wanted.insert(output.spec.name);
    const auto* found = merged.find(output.spec.name);
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
    report.tensors.push_back(compare(plan, output, merged, *found));
  }
  for (const auto* tensor : merged.tensors())
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
