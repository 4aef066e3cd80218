#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

/// The output folder of a run, but for its checkpoints.
namespace budwood::train {

struct StepMetrics;
struct Evaluation;

/// Throws when the folder holds an earlier run; with `overwrite` that run's checkpoints, best/ and
/// metrics are removed. Its adapter stays until the new one replaces it.
void start_run_folder(const std::filesystem::path& output, bool overwrite);
/// Drops metrics of steps after `step`, evaluations after `evaluated_step`, and a line that a kill
/// cut short.
void trim_metrics(const std::filesystem::path& output, int64_t step, int64_t evaluated_step);

void append_metrics(const std::filesystem::path& output, const StepMetrics& metrics);
void append_metrics(const std::filesystem::path& output, int64_t step,
                    const Evaluation& evaluation);
/// One object as JSON, keys sorted; numbers that are not finite are null.
std::string evaluation_json(int64_t step, const Evaluation& evaluation);

/// Peak memory of the process in MB (2^20 bytes).
double peak_rss_mb();

}  // namespace budwood::train
