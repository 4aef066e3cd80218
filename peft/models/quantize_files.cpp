#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/peft/models/calibrate.h>
#include <budwood/peft/models/gguf_source.h>
#include <budwood/peft/models/quantize_files.h>
#include <budwood/peft/models/registry.h>
#include <budwood/peft/models/save_gguf.h>
#include <budwood/peft/models/stored_tensors.h>
#include <budwood/peft/train/data.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>

namespace budwood::models {
namespace {

constexpr std::array kFormats = {"nf4",  "fp4",  "int8", "int4", "q4_0",
                                 "q4_1", "q8_0", "f16",  "bf16", "f32"};
constexpr std::array kGgufFormats = {"q4_0", "q4_1", "q8_0", "f16", "bf16", "f32"};
constexpr std::array kMethods = {"rtn", "hqq", "gptq", "awq"};
// Elements that are compared at a time. Small: freed pieces lie between packed matrices, which
// stay, and large ones would leave holes in the heap that nothing fills.
constexpr int64_t kPanelElements = 1 << 14;

template <class Names>
bool contains(const Names& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

bool makes_integers(const QuantizeFilesOptions& options) {
  return options.format == "int4" || options.format == "int8";
}

bool calibrates(const QuantizeFilesOptions& options) {
  return options.method == "gptq" || options.method == "awq";
}

void check(const QuantizeFilesOptions& options) {
  if (!contains(kFormats, options.format))
    throw Error("quantize", fmt::format("unknown format '{}'; known: {}", options.format,
                                        fmt::join(kFormats, ", ")));
  if (!contains(kMethods, options.method))
    throw Error("quantize", fmt::format("unknown method '{}'; known: {}", options.method,
                                        fmt::join(kMethods, ", ")));
  const bool integers = makes_integers(options);
  const bool floats = options.format == "nf4" || options.format == "fp4";
  if (options.method != "rtn" && !integers && !(floats && options.method == "gptq"))
    throw Error("quantize",
                fmt::format("method '{}' makes int4 or int8{}, found format '{}'", options.method,
                            options.method == "gptq" ? ", nf4 or fp4" : "", options.format));
  if (calibrates(options) && options.calibration.empty())
    throw Error("quantize",
                fmt::format("method '{}' looks at what goes through the model: it needs "
                            "calibration text",
                            options.method));
  if (options.calibration_tokens < 1 || options.sequence_length < 1)
    throw Error("quantize",
                fmt::format("calibration_tokens and sequence_length are positive, found "
                            "{} and {}",
                            options.calibration_tokens, options.sequence_length));
  if (!options.overwrite && std::filesystem::exists(options.out))
    throw Error("quantize", fmt::format("'{}' exists already", options.out));
}

// ||W - Q|| / ||W||.
double relative_error(const quant::Weight& plain, const quant::Weight& packed) {
  double difference = 0, size = 0;
  const int64_t step = std::max<int64_t>(1, kPanelElements / plain.in);
  for (int64_t begin = 0; begin < plain.out; begin += step) {
    const int64_t end = std::min(plain.out, begin + step);
    const auto w = plain.rows(begin, end, at::kFloat);
    difference +=
        (packed.rows(begin, end, at::kFloat) - w).square().sum(at::kDouble).item<double>();
    size += w.square().sum(at::kDouble).item<double>();
  }
  return size > 0 ? std::sqrt(difference / size) : 0;
}

void summarise(QuantizeFilesReport& report) {
  double squares = 0;
  for (const auto& m : report.matrices) {
    report.weights += m.out * m.in;
    report.bytes += m.bytes;
    squares += m.error * m.error;
  }
  if (!report.matrices.empty())
    report.error = std::sqrt(squares / static_cast<double>(report.matrices.size()));
}

QuantizeFilesReport round_to_nearest(const QuantizeFilesOptions& options) {
  QuantizeFilesReport report;
  // int8 by itself is LLM.int8; with zero points that a method moves it is group-affine.
  const bool grouped = options.method == "hqq" && options.format == "int8";
  LoadOptions loading{.dtype = options.dtype,
                      .quantize = grouped ? "affine8" : options.format,
                      .quantize_method = options.method,
                      .block_size = options.block_size,
                      .double_quant = options.double_quant,
                      .quantize_skip = options.skip};
  loading.on_quantized = [&](const std::string& name, const quant::Weight& plain,
                             const quant::Weight& packed) {
    report.matrices.push_back(
        {name, packed.out, packed.in, packed.bytes(), relative_error(plain, packed)});
    if (options.progress) options.progress(name);
  };
  auto model = load(options.model, loading);
  if (report.matrices.empty())
    throw Error("quantize", fmt::format("no matrix of '{}' is left to quantise; skipped are names "
                                        "with: {}",
                                        options.model, fmt::join(options.skip, ", ")));
  save(*model, options.out,
       {.weights = "packed",
        .max_shard_size = options.max_shard_size,
        .overwrite = options.overwrite,
        .tokenizer_from = options.model});
  return report;
}

// The first tokens of a token file, in sequences.
std::vector<std::vector<int64_t>> calibration_sequences(const QuantizeFilesOptions& options) {
  const auto file = train::TokenFile::open(options.calibration);
  file->check(read_config(options.model).vocab_size);
  std::vector<std::vector<int64_t>> sequences;
  int64_t left = options.calibration_tokens;
  for (int64_t row = 0; row < file->rows() && left > 0; ++row) {
    const auto ids = file->ids(row);
    const auto size = static_cast<int64_t>(ids.size());
    for (int64_t begin = 0; begin < size && left > 0; begin += options.sequence_length) {
      const int64_t count = std::min({options.sequence_length, size - begin, left});
      sequences.emplace_back(ids.begin() + begin, ids.begin() + begin + count);
      left -= count;
    }
  }
  return sequences;
}

QuantizeFilesReport calibrated(const QuantizeFilesOptions& options) {
  QuantizeFilesReport report;
  const auto sequences = calibration_sequences(options);
  auto model = load(options.model, {.dtype = options.dtype, .weights = "dense"});
  const auto layers = calibrate(*model, sequences,
                                {.method = options.method,
                                 .format = makes_integers(options) ? "affine" : options.format,
                                 .bits = options.format == "int8" ? 8 : 4,
                                 .group_size = options.block_size,
                                 .act_order = options.method == "gptq" && options.act_order,
                                 .static_groups = options.method == "gptq" && options.static_groups,
                                 .double_quant = options.double_quant,
                                 .skip = options.skip,
                                 .progress = [&](int64_t, int64_t, const std::string& path) {
                                   if (options.progress) options.progress(path);
                                 }});
  const auto stored = stored_tensors(*model, "quantize");
  for (const auto& layer : layers.layers) {
    const auto& w = *stored.at(layer.path + ".weight").matrix;
    report.matrices.push_back(
        {layer.path + ".weight", w.out, w.in, w.bytes(), layer.error, layer.rtn_error});
  }
  if (layers.tokens < options.calibration_tokens)
    report.warnings.push_back(fmt::format("the calibration text has {} tokens, {} were asked for",
                                          layers.tokens, options.calibration_tokens));
  save(*model, options.out,
       {.weights = "packed",
        .max_shard_size = options.max_shard_size,
        .overwrite = options.overwrite,
        .tokenizer_from = options.model});
  return report;
}

QuantizeFilesReport write_gguf(const QuantizeFilesOptions& options) {
  QuantizeFilesReport report;
  auto model = load(options.model, {.dtype = options.dtype});
  const auto saved =
      save_gguf(*model, options.out, {.type = options.format, .tokenizer_from = options.model});
  report.warnings = saved.warnings;
  // What was written is read back, and every matrix compared.
  GgufSource written(options.out, at::kFloat, /*packed=*/true);
  for (const auto& [name, tensor] : stored_tensors(*model, "quantize")) {
    if (!tensor.projection) continue;
    const auto packed = written.matrix(name, tensor.matrix->out, tensor.matrix->in);
    report.matrices.push_back(
        {name, packed.out, packed.in, packed.bytes(), relative_error(*tensor.matrix, packed)});
    if (options.progress) options.progress(name);
  }
  return report;
}

}  // namespace

QuantizeFilesReport quantize_files(const QuantizeFilesOptions& options) {
  check(options);
  const bool gguf = contains(kGgufFormats, options.format);
  auto report = gguf                  ? write_gguf(options)
                : calibrates(options) ? calibrated(options)
                                      : round_to_nearest(options);
  summarise(report);
  return report;
}

}  // namespace budwood::models
