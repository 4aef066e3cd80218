#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/companions.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <set>

namespace budwood {
namespace {

at::Tensor float_copy(const quant::Weight& weight) {
  return weight.rows(0, weight.out, at::kFloat).clone();
}

bool is_or_ends_with(const std::string& path, const std::string& name) {
  return path == name || path.ends_with("." + name);
}

// One storage is enough: a head is tied when it reads the table's own tensor.
bool share_weight(const quant::Weight& a, const quant::Weight& b) {
  return a.out == b.out && a.in == b.in && a.parts[0].data_ptr() == b.parts[0].data_ptr();
}

void add_copies(std::vector<Grafted>& made, const std::shared_ptr<const AdapterConfig>& config,
                const std::vector<Place>& places, const std::vector<std::string>& modules,
                Strictness strictness, std::vector<std::string>& warnings) {
  if (!config->modules_to_save) return;
  for (const auto& name : *config->modules_to_save) {
    bool slot = false;
    for (size_t i = 0; i < places.size(); ++i) {
      const auto& place = places[i];
      if (!is_or_ends_with(place.path, name)) continue;
      if (place.kind == SlotKind::linear)
        made.push_back({i, std::make_shared<CopiedLinear>(config, place.base)});
      else if (place.kind == SlotKind::embedding)
        made.push_back({i, std::make_shared<CopiedEmbedding>(config, place.base.weight)});
      else
        continue;
      slot = true;
    }
    if (slot) continue;
    const bool exists = std::any_of(modules.begin(), modules.end(), [&](const std::string& path) {
      return is_or_ends_with(path, name);
    });
    if (exists)
      throw Error("inject", fmt::format("modules_to_save names '{}', which is neither a projection "
                                        "nor a token table: such a module is not copied in C++",
                                        name));
    auto fault = fmt::format("modules_to_save entry '{}' matches no module of the model", name);
    if (strictness == Strictness::strict) throw Error("inject", fault);
    warnings.push_back(std::move(fault));
  }
}

void add_tokens(std::vector<Grafted>& made, const std::shared_ptr<const AdapterConfig>& config,
                const std::vector<Place>& places) {
  const auto indices = config->token_indices();
  if (std::holds_alternative<std::monostate>(indices)) return;
  const auto add = [&](size_t i, const std::vector<int64_t>& ids) {
    const auto& place = places[i];
    auto table = std::make_shared<TrainedTokens>(config, place.base.weight, ids, place.path);
    made.push_back({i, table});
    for (size_t j = 0; j < places.size(); ++j)
      if (places[j].kind == SlotKind::linear &&
          share_weight(places[j].base.weight, place.base.weight))
        made.push_back({j, std::make_shared<TiedTokens>(config, table)});
  };
  const auto find = [&](const std::string& name) -> size_t {
    for (size_t i = 0; i < places.size(); ++i)
      if (places[i].kind == SlotKind::embedding && is_or_ends_with(places[i].path, name)) return i;
    throw Error("inject",
                fmt::format("trainable_token_indices names '{}', and the model has no token table "
                            "of that name",
                            name));
  };
  if (const auto* ids = std::get_if<std::vector<int64_t>>(&indices)) {
    // The first table of a model is that of its tokens.
    const auto table = std::find_if(places.begin(), places.end(), [](const Place& place) {
      return place.kind == SlotKind::embedding;
    });
    if (table == places.end())
      throw Error("inject", "trainable_token_indices: the model has no token table");
    return add(static_cast<size_t>(table - places.begin()), *ids);
  }
  for (const auto& [name, ids] : std::get<PatternMap<std::vector<int64_t>>>(indices))
    add(find(name), ids);
}

}  // namespace

std::vector<Grafted> make_companions(const std::shared_ptr<const AdapterConfig>& config,
                                     const std::vector<Place>& places,
                                     const std::vector<std::string>& modules, Strictness strictness,
                                     std::vector<std::string>& warnings) {
  std::vector<Grafted> made;
  add_copies(made, config, places, modules, strictness, warnings);
  add_tokens(made, config, places);
  std::set<size_t> taken;
  for (const auto& [place, adapter] : made)
    if (!taken.insert(place).second)
      throw Error("inject", fmt::format("modules_to_save and trainable_token_indices ask for '{}' "
                                        "twice",
                                        places[place].path));
  return made;
}

CopiedLinear::CopiedLinear(std::shared_ptr<const AdapterConfig> config, const LinearBase& base)
    : LinearAdapter(std::move(config)) {
  weight_ = register_parameter("weight", float_copy(base.weight));
  if (base.bias.defined())
    bias_ = register_parameter("bias", base.bias.detach().to(at::kFloat, false, /*copy=*/true));
}

LinearTerm CopiedLinear::term(const LinearBase&) const {
  return {.own_weight = weight_, .own_bias = bias_};
}

AdapterState CopiedLinear::state() const {
  AdapterState tensors = {{"weight", weight_}};
  if (bias_.defined()) tensors.emplace_back("bias", bias_);
  return tensors;
}

CopiedEmbedding::CopiedEmbedding(std::shared_ptr<const AdapterConfig> config,
                                 const quant::Weight& table)
    : EmbeddingAdapter(std::move(config)) {
  weight_ = register_parameter("weight", float_copy(table));
}

at::Tensor CopiedEmbedding::forward(const quant::Weight&, const at::Tensor& ids, at::Tensor) const {
  return at::embedding(weight_, ids);
}

at::Tensor CopiedEmbedding::fold_rows(const quant::Weight&, at::Tensor rows, int64_t begin) const {
  return weight_.detach().narrow(0, begin, rows.size(0)).to(rows.device(), at::kDouble);
}

AdapterState CopiedEmbedding::state() const {
  return {{"weight", weight_}};
}

TrainedTokens::TrainedTokens(std::shared_ptr<const AdapterConfig> config,
                             const quant::Weight& table, const std::vector<int64_t>& ids,
                             const std::string& path)
    : EmbeddingAdapter(std::move(config)) {
  if (ids.empty())
    throw Error("inject", fmt::format("trainable_token_indices has no ids for '{}'", path));
  std::set<int64_t> seen;
  for (const auto id : ids) {
    if (id < 0 || id >= table.out)
      throw Error("inject", fmt::format("trainable_token_indices has {}, and the table '{}' has "
                                        "{} rows",
                                        id, path, table.out));
    if (!seen.insert(id).second)
      throw Error("inject", fmt::format("trainable_token_indices has {} twice", id));
  }
  ids_ = register_buffer("ids", at::tensor(ids, at::kLong));
  rows_ = register_parameter("trainable_tokens_delta", table.gather(ids_, at::kFloat).clone());
  auto index = at::full({table.out}, -1, at::kLong);
  index.index_put_({ids_}, at::arange(ids_.size(0)));
  index_ = register_buffer("index", index);
}

at::Tensor TrainedTokens::forward(const quant::Weight&, const at::Tensor& ids,
                                  at::Tensor rows) const {
  const auto flat = index_.index_select(0, ids.flatten());
  const auto where = (flat >= 0).nonzero().flatten();
  if (where.size(0) == 0) return rows;
  const auto chosen = rows_.index_select(0, flat.index_select(0, where)).to(rows.scalar_type());
  const auto shape = rows.sizes().vec();
  return rows.reshape({-1, shape.back()}).index_copy(0, where, chosen).view(shape);
}

at::Tensor TrainedTokens::fold_rows(const quant::Weight&, at::Tensor rows, int64_t begin) const {
  const auto local = index_.narrow(0, begin, rows.size(0)).to(rows.device());
  const auto where = (local >= 0).nonzero().flatten();
  const auto chosen =
      rows_.detach().to(rows.device()).index_select(0, local.index_select(0, where));
  return rows.index_copy(0, where, chosen.to(rows.scalar_type()));
}

AdapterState TrainedTokens::state() const {
  return {{"token_adapter.trainable_tokens_delta", rows_}};
}

LinearTerm TiedTokens::term(const LinearBase& base) const {
  const auto& ids = table_->ids();
  auto places = at::zeros({base.weight.out, ids.size(0)}, at::kFloat);
  places.index_put_({ids, at::arange(ids.size(0))}, at::ones({1}));
  return {.a = table_->rows() - base.weight.gather(ids, at::kFloat), .b = places};
}

}  // namespace budwood
