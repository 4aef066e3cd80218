#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>

#include <budwood/peft/models/generate.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>
#include <set>

namespace budwood::models {
namespace {

void check(const CausalLM& model, const std::vector<int64_t>& prompt, const GenerateOptions& o) {
  const auto fail = [](const std::string& fact) { throw Error("generate", fact); };
  if (prompt.empty()) fail("the prompt has no tokens");
  if (o.max_new_tokens < 1)
    fail(fmt::format("max_new_tokens is at least 1, found {}", o.max_new_tokens));
  if (!(o.temperature >= 0) || !std::isfinite(o.temperature))
    fail(fmt::format("temperature is 0 (greedy) or positive, found {}", o.temperature));
  if (o.top_k < 0) fail(fmt::format("top_k is 0 (all) or positive, found {}", o.top_k));
  if (!(o.top_p > 0 && o.top_p <= 1)) fail(fmt::format("top_p lies in (0, 1], found {}", o.top_p));
  if (!(o.repetition_penalty > 0)) fail("repetition_penalty is positive");
  const auto limit = model.config().max_position_embeddings;
  if (static_cast<int64_t>(prompt.size()) >= limit)
    fail(fmt::format("a prompt of {} tokens leaves no room in a model of {} positions",
                     prompt.size(), limit));
}

TokenBatch step_batch(const std::vector<int64_t>& ids, int64_t first_position) {
  TokenBatch batch;
  batch.ids = at::tensor(ids, at::kLong);
  batch.positions =
      at::arange(first_position, first_position + static_cast<int64_t>(ids.size()), at::kLong);
  batch.cu_seqlens = {0, static_cast<int64_t>(ids.size())};
  return batch;
}

at::Tensor penalised(const at::Tensor& logits, const std::set<int64_t>& seen, double penalty) {
  if (penalty == 1.0) return logits;
  auto result = logits.clone();
  const auto ids = at::tensor(std::vector<int64_t>(seen.begin(), seen.end()), at::kLong);
  const auto own = result.index_select(0, ids);
  result.index_copy_(0, ids, at::where(own.lt(0), own * penalty, own / penalty));
  return result;
}

}  // namespace

int64_t sample(const at::Tensor& logits, const GenerateOptions& options, at::Generator& generator) {
  if (options.temperature == 0) return logits.argmax().item<int64_t>();
  auto scaled = logits.to(at::kFloat) / options.temperature;
  const auto [sorted, order] = scaled.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
  int64_t keep = sorted.size(0);
  if (options.top_k > 0) keep = std::min(keep, options.top_k);
  auto probability = sorted.narrow(0, 0, keep).softmax(-1);
  if (options.top_p < 1) {
    // The token that crosses the bound stays in.
    const auto before = probability.cumsum(-1) - probability;
    keep = std::max<int64_t>(1, before.lt(options.top_p).sum().item<int64_t>());
    probability = probability.narrow(0, 0, keep);
  }
  const auto drawn = at::multinomial(probability, 1, /*replacement=*/false, generator);
  return order[drawn.item<int64_t>()].item<int64_t>();
}

std::vector<int64_t> generate(CausalLM& model, const std::vector<int64_t>& prompt,
                              const GenerateOptions& options) {
  check(model, prompt, options);
  at::NoGradGuard no_grad;
  const bool was_training = model.is_training();
  model.eval();
  auto generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
  const auto& stops =
      options.eos_token_id.empty() ? model.config().eos_token_id : options.eos_token_id;
  const auto room = model.config().max_position_embeddings - static_cast<int64_t>(prompt.size());

  KvCache cache(model.config().num_hidden_layers);
  std::set<int64_t> seen(prompt.begin(), prompt.end());
  std::vector<int64_t> next = prompt, out;
  while (static_cast<int64_t>(out.size()) < std::min(options.max_new_tokens, room)) {
    const auto hidden = model.hidden(step_batch(next, cache.length()), &cache);
    const auto logits = model.logits(hidden.narrow(0, hidden.size(0) - 1, 1))[0];
    if (!logits.isfinite().all().item<bool>())
      throw Error("generate", fmt::format("the logits of token {} are not finite", out.size()));
    const auto token =
        sample(penalised(logits, seen, options.repetition_penalty), options, generator);
    out.push_back(token);
    seen.insert(token);
    next = {token};
    if (options.on_token && !options.on_token(token)) break;
    if (std::find(stops.begin(), stops.end(), token) != stops.end()) break;
  }
  model.train(was_training);
  return out;
}

}  // namespace budwood::models
