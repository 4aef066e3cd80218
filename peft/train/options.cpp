#include <budwood/peft/io/text.h>
#include <budwood/peft/json.h>
#include <budwood/peft/optim/block_schedule.h>
#include <budwood/peft/train/options.h>
#include <budwood/peft/train/sampler.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

namespace budwood::train {
namespace {

constexpr const char* kWhere = "TrainOptions";

[[noreturn]] void fail(const char* field, const std::string& value, const char* wanted) {
  throw Error(kWhere, fmt::format("{} is {}, wanted {}", field, value, wanted));
}

void at_least(const char* field, int64_t value, int64_t least) {
  if (value < least)
    throw Error(kWhere, fmt::format("{} is {}, wanted at least {}", field, value, least));
}

void in_range(const char* field, double value, bool holds, const char* wanted) {
  if (!holds || !std::isfinite(value)) fail(field, fmt::format("{}", value), wanted);
}

}  // namespace

std::vector<ConfigField> TrainOptions::fields() {
  return {bind_field("steps", steps),
          bind_field("epochs", epochs),
          bind_field("batch_size", batch_size),
          bind_field("grad_accumulation", grad_accumulation),
          bind_field("sequence_length", sequence_length),
          bind_field("packing", packing),
          bind_field("long_rows", long_rows),
          bind_field("shuffle", shuffle),
          bind_field("gradient_checkpointing", gradient_checkpointing),
          bind_field("activation_dtype", activation_dtype),
          bind_field("tune", tune),
          bind_field("optimizer", optimizer),
          bind_field("selected_tokens", selected_tokens),
          bind_field("fused_backward", fused_backward),
          bind_field("blocks", blocks),
          bind_field("active_blocks", active_blocks),
          bind_field("block_steps", block_steps),
          bind_field("block_order", block_order),
          bind_field("galore_rank", galore_rank),
          bind_field("galore_refresh", galore_refresh),
          bind_field("galore_scale", galore_scale),
          bind_field("mezo_eps", mezo_eps),
          bind_field("learning_rate", learning_rate),
          bind_field("lora_plus_ratio", lora_plus_ratio),
          bind_field("lora_plus_embedding_rate", lora_plus_embedding_rate),
          bind_field("weight_decay", weight_decay),
          bind_field("beta1", beta1),
          bind_field("beta2", beta2),
          bind_field("eps", eps),
          bind_field("schedule", schedule),
          bind_field("warmup_steps", warmup_steps),
          bind_field("warmup_ratio", warmup_ratio),
          bind_field("min_learning_rate_ratio", min_learning_rate_ratio),
          bind_field("max_grad_norm", max_grad_norm),
          bind_field("clip_value", clip_value),
          bind_field("seed", seed),
          bind_field("eval_every", eval_every),
          bind_field("eval_batches", eval_batches),
          bind_field("save_every", save_every),
          bind_field("keep_last", keep_last),
          bind_field("log_every", log_every),
          bind_field("output", output),
          bind_field("resume", resume),
          bind_field("overwrite", overwrite),
          bind_field("adapter", adapter),
          bind_field("tokenizer_from", tokenizer_from)};
}

void TrainOptions::validate() const {
  at_least("steps", steps, 0);
  if (steps == 0) in_range("epochs", epochs, epochs > 0, "more than 0, or steps to be set");
  at_least("grad_accumulation", grad_accumulation, 1);
  at_least("gradient_checkpointing", gradient_checkpointing, 0);
  if (activation_dtype != "float32" && activation_dtype != "bfloat16")
    fail("activation_dtype", io::in_quotes(activation_dtype), "'float32' or 'bfloat16'");
  SampleOptions{sequence_length, batch_size, packing, long_rows}.validate();
  check_optimizer();
  in_range("learning_rate", learning_rate, learning_rate > 0, "more than 0");
  in_range("lora_plus_ratio", lora_plus_ratio, lora_plus_ratio > 0, "more than 0");
  in_range("lora_plus_embedding_rate", lora_plus_embedding_rate, lora_plus_embedding_rate > 0,
           "more than 0");
  in_range("weight_decay", weight_decay, weight_decay >= 0, "at least 0");
  in_range("beta1", beta1, beta1 >= 0 && beta1 < 1, "at least 0 and below 1");
  in_range("beta2", beta2, beta2 >= 0 && beta2 < 1, "at least 0 and below 1");
  in_range("eps", eps, eps > 0, "more than 0");
  if (schedule != "constant" && schedule != "linear" && schedule != "cosine")
    fail("schedule", io::in_quotes(schedule), "'constant', 'linear' or 'cosine'");
  at_least("warmup_steps", warmup_steps, 0);
  in_range("warmup_ratio", warmup_ratio, warmup_ratio >= 0 && warmup_ratio <= 1, "0 to 1");
  in_range("min_learning_rate_ratio", min_learning_rate_ratio,
           min_learning_rate_ratio >= 0 && min_learning_rate_ratio <= 1, "0 to 1");
  in_range("clip_value", clip_value, clip_value >= 0, "at least 0 (0 = no clipping)");
  in_range("max_grad_norm", max_grad_norm, max_grad_norm >= 0, "at least 0 (0 = no clipping)");
  at_least("seed", seed, 0);
  at_least("eval_every", eval_every, 0);
  at_least("eval_batches", eval_batches, 0);
  at_least("save_every", save_every, 0);
  at_least("keep_last", keep_last, 0);
  at_least("log_every", log_every, 1);
  if (adapter.empty()) fail("adapter", "empty", "the name of the adapter that is trained");
  if (output.empty() && save_every > 0)
    fail("output", "empty", "a folder, because save_every asks for checkpoints");
  if (output.empty() && resume == "auto")
    fail("output", "empty", "the folder whose newest checkpoint is to be resumed");
  if (overwrite && !resume.empty())
    fail("overwrite", "true", "false, because resume asks to go on with what is there");
}

void TrainOptions::check_optimizer() const {
  const auto names = optim::rule_names();
  const bool rule = std::find(names.begin(), names.end(), optimizer) != names.end();
  if (!rule && optimizer != "lora_fa" && optimizer != "mezo")
    throw Error(kWhere, fmt::format("optimizer is {}, wanted lora_fa, mezo, {}",
                                    io::in_quotes(optimizer), fmt::join(names, ", ")));
  if (tune != "adapter" && tune != "full") fail("tune", io::in_quotes(tune), "'adapter' or 'full'");
  if (tune == "full" && (optimizer == "lora_fa" || lora_plus_ratio != 1.0))
    fail("tune", "'full'",
         "'adapter', because lora_fa and lora_plus_ratio are about LoRA's factors");
  if (updates_during_backward() && grad_accumulation > 1)
    fail(
        "grad_accumulation", fmt::format("{}", grad_accumulation),
        "1, because parameters are updated during the backward of a batch; a larger batch_size has "
        "the same effect");
  if (fused_backward && (optimizer == "lora_fa" || optimizer == "mezo"))
    fail("fused_backward", "true",
         "false: lora_fa corrects gradients after the backward, and mezo has none");
  if (blocks != "all") {
    if (optimizer == "mezo" || optimizer == "lora_fa")
      fail("blocks", io::in_quotes(blocks), "'all' with lora_fa and mezo");
    optim::BlockOptions{blocks, active_blocks, block_steps, block_order}.validate();
  }
  in_range("selected_tokens", selected_tokens, selected_tokens >= 0, "at least 0 (0 = all)");
  if (selected_tokens >= 1 && selected_tokens != std::floor(selected_tokens))
    fail("selected_tokens", fmt::format("{}", selected_tokens),
         "a whole number of tokens, or a part below 1");
  if (selected_tokens > static_cast<double>(sequence_length))
    fail("selected_tokens", fmt::format("{}", selected_tokens),
         "no more than sequence_length, or a part below 1");
  if (selected_tokens > 0 && optimizer == "mezo")
    fail("selected_tokens", fmt::format("{}", selected_tokens),
         "0 with mezo, which has no backward");
  at_least("galore_rank", galore_rank, 1);
  at_least("galore_refresh", galore_refresh, 1);
  in_range("galore_scale", galore_scale, galore_scale > 0, "more than 0");
  in_range("mezo_eps", mezo_eps, mezo_eps > 0, "more than 0");
  if (optimizer == "mezo" && (max_grad_norm != 1.0 && max_grad_norm != 0.0))
    fail("max_grad_norm", fmt::format("{}", max_grad_norm), "0 with mezo, which has no gradient");
}

TrainOptions TrainOptions::from_json(std::string_view text, const std::string& source) {
  const auto object = parse_ordered_json(text, source);
  if (!object.is_object()) throw Error(kWhere, fmt::format("{}: wanted a JSON object", source));
  TrainOptions options;
  const auto fields = options.fields();
  std::vector<std::string> known;
  for (const auto& field : fields) known.push_back(field.name);
  for (const auto& [key, value] : object.items()) {
    const auto it = std::find(known.begin(), known.end(), key);
    if (it == known.end())
      throw Error(kWhere, fmt::format("{}: there is no option {}; the nearest is '{}'", source,
                                      io::in_quotes(key), nearest_name(key, known)));
    if (const char* wanted = fields[static_cast<size_t>(it - known.begin())].read(value))
      throw Error(kWhere,
                  fmt::format("{}: {} is {}, wanted {}", source, key, shown(value), wanted));
  }
  options.validate();
  return options;
}

std::string TrainOptions::to_json() const {
  auto copy = *this;
  Json object = Json::object();
  for (const auto& field : copy.fields()) object[field.name] = field.write();
  return dump_like_python(object);
}

std::vector<std::string> TrainOptions::differences(const TrainOptions& other) const {
  static const std::set<std::string> free = {"output",
                                             "resume",
                                             "overwrite",
                                             "save_every",
                                             "keep_last",
                                             "log_every",
                                             "gradient_checkpointing",
                                             "tokenizer_from"};
  const bool open_end = schedule == "constant" && other.schedule == "constant" &&
                        warmup_ratio == 0 && other.warmup_ratio == 0;
  auto a = *this, b = other;
  const auto ours = a.fields(), theirs = b.fields();
  std::vector<std::string> names;
  for (size_t i = 0; i < ours.size(); ++i) {
    const auto& name = ours[i].name;
    if (free.contains(name) || (open_end && (name == "steps" || name == "epochs"))) continue;
    if (ours[i].write() != theirs[i].write()) names.push_back(name);
  }
  return names;
}

}  // namespace budwood::train
