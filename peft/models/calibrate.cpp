#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <budwood/peft/models/calibrate.h>
#include <budwood/peft/models/running.h>
#include <budwood/quant/calibrate/awq.h>
#include <budwood/quant/calibrate/gptq.h>
#include <budwood/quant/calibrate/hessian.h>
#include <budwood/quant/error.h>
#include <budwood/quant/quantize.h>
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <optional>

namespace budwood::models {
namespace {

namespace cal = quant::calibrate;
using Sequences = std::vector<std::vector<int64_t>>;

bool looks_at_data(const CalibrateOptions& options) {
  return options.method == "gptq" || options.method == "awq";
}

void check(const CalibrateOptions& options, const Sequences& sequences) {
  constexpr std::array<const char*, 4> kMethods = {"gptq", "awq", "hqq", "rtn"};
  const auto refuse = [](const std::string& fact) { throw Error("calibrate", fact); };
  if (std::find(kMethods.begin(), kMethods.end(), options.method) == kMethods.end())
    refuse(fmt::format("unknown method '{}'; known: gptq, awq, hqq, rtn", options.method));
  const bool affine = options.format == "affine";
  if (!affine && options.format != "nf4" && options.format != "fp4")
    refuse(fmt::format("unknown format '{}'; known: affine, nf4, fp4", options.format));
  if (!affine && (options.method == "awq" || options.method == "hqq"))
    refuse(fmt::format("{} makes integers, found format '{}'", options.method, options.format));
  if (!affine && options.bits != 4)
    refuse(fmt::format("{} has 4 bits, found {}", options.format, options.bits));
  if (affine && options.double_quant) refuse("double_quant is for nf4 and fp4");
  if (!affine && options.symmetric)
    refuse(fmt::format("symmetric is for integers, found format '{}'", options.format));
  if (options.bits != 4 && options.bits != 8)
    refuse(fmt::format("{} bits; wanted 4 or 8", options.bits));
  if (options.group_size < 1 && options.group_size != -1)
    refuse(fmt::format("group size {}; wanted 1 or more, or -1", options.group_size));
  if (options.batch_tokens < 1 || options.search_tokens < 1)
    refuse("batch_tokens and search_tokens are 1 or more");
  if ((options.act_order || options.static_groups) && options.method != "gptq")
    refuse(fmt::format("act_order and static_groups are for gptq, found '{}'", options.method));
  if (options.symmetric && options.method == "hqq") refuse("symmetric is not for hqq");
  if (sequences.empty() && looks_at_data(options))
    refuse(fmt::format("{} looks at data: wanted at least one sequence", options.method));
  for (size_t i = 0; i < sequences.size(); ++i)
    if (sequences[i].empty()) refuse(fmt::format("sequence {} has no tokens", i));
}

bool skipped(const Projection& projection, const CalibrateOptions& options) {
  return std::any_of(options.skip.begin(), options.skip.end(), [&](const std::string& part) {
    return projection.path.find(part) != std::string::npos;
  });
}

void require_plain(const Projection& projection) {
  const auto* slot = projection.slot.get();
  if (!slot->adapter_names().empty())
    throw Error("calibrate", fmt::format("'{}' has the adapter '{}': merge or detach it first",
                                         projection.path, slot->adapter_names()[0]));
  if (slot->weight().packed())
    throw Error("calibrate",
                fmt::format("the weight of '{}' is {} already: load the model with dense weights",
                            projection.path, quant::form_of(slot->weight().format).name()));
}

// The input of one group, as calibration has seen it.
struct Seen {
  explicit Seen(int64_t in) : hessian(in) {}
  cal::HessianSum hessian;
  std::vector<std::pair<at::Tensor, const TokenBatch*>> kept;
};

std::vector<Seen> observe(const Block& block, const std::vector<Running>& running,
                          int64_t keep_tokens) {
  std::vector<Seen> seen;
  std::vector<std::unique_ptr<Observation>> observations;
  const TokenBatch* batch = nullptr;
  for (const auto& group : block.groups)
    seen.emplace_back(group.projections[0].slot->in_features());
  for (size_t g = 0; g < seen.size(); ++g)
    observations.push_back(std::make_unique<Observation>(
        block.groups[g].projections[0].slot, [&seen, &batch, g, keep_tokens](const at::Tensor& x) {
          auto& one = seen[g];
          if (one.hessian.tokens() < keep_tokens) one.kept.emplace_back(x, batch);
          one.hessian.add(x);
        }));
  for (const auto& [its_batch, x] : running) {
    batch = &its_batch;
    block.forward(x, its_batch);
  }
  return seen;
}

at::Tensor weight_of(const Projection& projection) {
  const auto& w = projection.slot->weight();
  return w.rows(0, w.out, at::kFloat);
}

// A projection on its way: `work` = diag(1 / rows) W diag(columns) is what gets rounded.
struct Layer {
  Projection projection;
  at::Tensor work;           // fp32 [out, in]
  at::Tensor rows, columns;  // fp32 [out, 1] and [1, in], ones at first
  bool skip = false;
  double ratio = 0;

  /// A matrix in the place of `work`, as W: diag(rows) m diag(1 / columns).
  at::Tensor undone(const at::Tensor& m) const { return m.mul(rows).div_(columns); }
};

Layer layer_of(const Projection& projection, const CalibrateOptions& options) {
  Layer layer{projection, {}, {}, {}, skipped(projection, options), 0};
  if (layer.skip) return layer;
  layer.work = weight_of(projection);
  layer.rows = at::ones({layer.work.size(0), 1}, at::kFloat);
  layer.columns = at::ones({1, layer.work.size(1)}, at::kFloat);
  return layer;
}

class BlockCalibration {
 public:
  BlockCalibration(const Block& block, const std::vector<Running>& running,
                   const CalibrateOptions& options)
      : block_(block), options_(options) {
    for (const auto& group : block.groups) {
      layers_.emplace_back();
      for (const auto& projection : group.projections)
        layers_.back().push_back(layer_of(projection, options));
    }
    if (!running.empty())
      seen_ = observe(block, running, options.method == "awq" ? options.search_tokens : 0);
  }

  void quantize(std::vector<LayerReport>& reports) {
    if (options_.method == "awq") scale_groups();
    for (size_t g = 0; g < layers_.size(); ++g)
      for (auto& layer : layers_[g])
        if (!layer.skip) reports.push_back(quantize(layer, g));
  }

 private:
  quant::QuantizeOptions rounding(const Layer& layer) const {
    const auto* integers = options_.bits == 4 ? "int4" : "affine8";
    return {.format = options_.format == "affine" ? integers : options_.format,
            .block_size = options_.group_size == -1 ? layer.work.size(1) : options_.group_size,
            .double_quant = options_.double_quant,
            .symmetric = options_.symmetric};
  }

  // The mean of x xᵀ over the inputs that `work` multiplies.
  at::Tensor hessian(const Layer& layer, size_t g) const {
    const auto& mean = seen_[g].hessian.mean();
    if (layer.ratio == 0) return mean;
    return mean.div(layer.columns).div_(layer.columns.t());
  }

  quant::Weight packed(const Layer& layer, size_t g) const {
    auto plain = rounding(layer);
    if (options_.method == "gptq")
      return cal::gptq(layer.work, hessian(layer, g),
                       {.format = options_.format,
                        .bits = options_.bits,
                        .group_size = options_.group_size,
                        .act_order = options_.act_order,
                        .static_groups = options_.static_groups,
                        .damping = options_.damping,
                        .symmetric = options_.symmetric,
                        .double_quant = options_.double_quant});
    if (options_.method == "awq" && !layer.projection.feeds_scores)
      return quant::quantize(cal::awq_clip(layer.work, hessian(layer, g), awq_options()), plain);
    if (options_.method == "hqq") plain.method = "hqq";
    return quant::quantize(layer.work, plain);
  }

  LayerReport quantize(Layer& layer, size_t g) try {
    const auto w = layer.undone(layer.work);
    const auto rtn = quant::quantize(w, rounding(layer)).rows(0, w.size(0), at::kFloat).sub_(w);
    auto weight = packed(layer, g);
    const auto delta = layer.undone(weight.rows(0, w.size(0), at::kFloat).sub_(layer.work));
    LayerReport report{.path = layer.projection.path, .awq_ratio = layer.ratio};
    report.rtn_weight_error = (rtn.norm() / w.norm()).item<double>();
    report.weight_error = (delta.norm() / w.norm()).item<double>();
    report.rtn_error = report.error = std::numeric_limits<double>::quiet_NaN();
    if (!seen_.empty()) {
      const auto& mean = seen_[g].hessian.mean();
      const double whole = cal::output_error(w, mean);
      report.rtn_error = std::sqrt(cal::output_error(rtn, mean) / whole);
      report.error = std::sqrt(cal::output_error(delta, mean) / whole);
    }
    layer.projection.slot->replace_weight(std::move(weight));
    layer.work.reset();
    return report;
  } catch (const Error& e) {
    throw Error("calibrate", fmt::format("'{}': {}", layer.projection.path, e.what()));
  }

  cal::AwqOptions awq_options() const {
    return {
        .bits = options_.bits, .group_size = options_.group_size, .symmetric = options_.symmetric};
  }

  Layer* find(const LinearSlot& slot) {
    for (auto& group : layers_)
      for (auto& layer : group)
        if (layer.projection.slot.ptr() == slot.ptr()) return &layer;
    return nullptr;
  }

  // All scales are found on the block as it was; then they are folded in.
  void scale_groups() {
    std::vector<std::optional<cal::AwqScale>> scales;
    for (size_t g = 0; g < layers_.size(); ++g) scales.push_back(scale_of(g));
    for (size_t g = 0; g < layers_.size(); ++g)
      if (scales[g] && scales[g]->ratio > 0) fold(g, *scales[g]);
    for (auto& group : layers_)
      for (auto& layer : group)
        if (!layer.skip) layer.work = weight_of(layer.projection);
  }

  // None where there is nowhere to put the factor, or a projection that it must not touch.
  std::optional<cal::AwqScale> scale_of(size_t g) {
    const auto& group = block_.groups[g];
    const auto& layers = layers_[g];
    if (std::any_of(layers.begin(), layers.end(), [](const Layer& l) { return l.skip; })) return {};
    if (!can_move_scale(group)) return {};
    if (!group.norm.defined() && find(group.source)->skip) return {};
    std::vector<at::Tensor> weights;
    for (const auto& layer : layers) weights.push_back(layer.work);
    const auto& mean = seen_[g].hessian.mean();
    // Of one projection alone the Hessian gives the error over all tokens.
    const auto by_hessian = [&](const std::vector<at::Tensor>& rounded) {
      return cal::output_error(rounded[0] - weights[0], mean);
    };
    if (weights.size() == 1)
      return cal::awq_scale(weights, seen_[g].hessian.mean_abs(), by_hessian, awq_options());
    std::vector<at::Tensor> wanted;
    for (const auto& [x, batch] : seen_[g].kept) wanted.push_back(group.output(x, *batch));
    return cal::awq_scale(
        weights, seen_[g].hessian.mean_abs(),
        [&](const std::vector<at::Tensor>& rounded) { return output_error(g, rounded, wanted); },
        awq_options());
  }

  // Mean squared error of what the block makes of the group with other weights in its slots.
  double output_error(size_t g, const std::vector<at::Tensor>& weights,
                      const std::vector<at::Tensor>& wanted) {
    struct Restore {
      std::vector<std::pair<LinearSlot, quant::Weight>> old;
      ~Restore() {
        for (auto& [slot, weight] : old) slot->replace_weight(std::move(weight));
      }
    } restore;
    for (size_t i = 0; i < weights.size(); ++i) {
      auto slot = layers_[g][i].projection.slot;
      restore.old.emplace_back(slot, slot->weight());
      slot->replace_weight(quant::Weight::dense(weights[i]));
    }
    double sum = 0;
    int64_t count = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const auto& [x, batch] = seen_[g].kept[i];
      const auto delta = block_.groups[g].output(x, *batch).to(at::kFloat) - wanted[i];
      sum += delta.square().sum(at::kDouble).item<double>();
      count += delta.numel();
    }
    return sum / static_cast<double>(count);
  }

  void fold(size_t g, const cal::AwqScale& found) {
    const auto scale = move_scale(block_.groups[g], found.scale);
    if (!block_.groups[g].norm.defined()) {
      auto* source = find(block_.groups[g].source);
      source->rows = source->rows * scale.unsqueeze(1);
    }
    for (auto& layer : layers_[g]) {
      layer.columns = scale.unsqueeze(0);
      layer.ratio = found.ratio;
    }
  }

  const Block& block_;
  const CalibrateOptions& options_;
  std::vector<std::vector<Layer>> layers_;  // of each group
  std::vector<Seen> seen_;                  // of each group; empty without sequences
};

bool has_work(const Block& block, const CalibrateOptions& options) {
  for (const auto& group : block.groups)
    for (const auto& projection : group.projections)
      if (!skipped(projection, options)) return true;
  return false;
}

}  // namespace

CalibrateReport calibrate(CausalLM& model, const Sequences& sequences,
                          const CalibrateOptions& options) {
  const auto begin = std::chrono::steady_clock::now();
  check(options, sequences);
  at::NoGradGuard no_grad;
  auto blocks = model.blocks();
  while (!blocks.empty() && !has_work(blocks.back(), options)) blocks.pop_back();
  if (blocks.empty()) throw Error("calibrate", "every projection is skipped: nothing to quantise");
  for (const auto& block : blocks)
    for (const auto& group : block.groups)
      for (const auto& projection : group.projections)
        if (!skipped(projection, options)) require_plain(projection);

  // Scales are tried on whole batches.
  const int64_t tokens = options.method == "awq"
                             ? std::min(options.batch_tokens, options.search_tokens)
                             : options.batch_tokens;
  auto running = start_running(model, sequences, tokens);
  CalibrateReport report;
  for (const auto& one : running) report.tokens += one.batch.tokens();
  const auto total = static_cast<int64_t>(blocks.size());
  for (int64_t b = 0; b < total; ++b) {
    const auto& block = blocks[static_cast<size_t>(b)];
    if (has_work(block, options)) BlockCalibration(block, running, options).quantize(report.layers);
    if (b + 1 < total)
      for (auto& [batch, x] : running) x = block.forward(x, batch);
    if (options.progress) options.progress(b + 1, total, block.path);
  }
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
  report.seconds = spent.count();
  return report;
}

}  // namespace budwood::models
