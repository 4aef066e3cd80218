#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/method.h>
#include <budwood/peft/methods/reft.h>
#include <budwood/peft/methods/reft_config.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>

namespace budwood {

Reft::Reft(std::shared_ptr<const ReftConfig> config, int64_t hidden, uint64_t seed)
    : BlockAdapter(config) {
  if (config->r > hidden)
    throw Error("inject", fmt::format("r is {}, above the hidden size {}", config->r, hidden));
  auto generator = stream(seed);
  if (config->tied_weights) {
    units_.push_back(unit("all", hidden, generator));
    return;
  }
  if (config->prefix_positions > 0) units_.push_back(unit("prefix", hidden, generator));
  if (config->suffix_positions > 0) units_.push_back(unit("suffix", hidden, generator));
}

const ReftConfig& Reft::own() const {
  return static_cast<const ReftConfig&>(*config());
}

Reft::Unit Reft::unit(const std::string& name, int64_t hidden, at::Generator generator) {
  Unit u{.name = name};
  auto start = at::empty({own().r, hidden}, at::kFloat).normal_(0.0, 1.0, generator);
  start = std::get<0>(at::linalg_qr(start.t())).t().contiguous();
  const double bound = 1.0 / std::sqrt(static_cast<double>(hidden));
  auto source = own().identity_init ? start.clone()
                                    : at::empty_like(start).uniform_(-bound, bound, generator);
  if (own().identity_init && own().variant == "direft") source.zero_();
  auto bias = at::zeros({own().r}, at::kFloat);
  if (!own().identity_init) bias.uniform_(-bound, bound, generator);
  u.free = register_parameter("free_" + name, start);
  u.source = register_parameter("source_" + name, source);
  u.bias = register_parameter("bias_" + name, bias);
  u.rotate = register_buffer("rotate_" + name, start.t().contiguous().clone());
  return u;
}

at::Tensor Reft::rotation(const Unit& u) const {
  if (own().variant != "loreft") return u.free;
  const auto triangle = at::linalg_cholesky(u.free.mm(u.free.t()));
  return at::linalg_solve_triangular(triangle, u.free, /*upper=*/false);
}

at::Tensor Reft::edited(const Unit& u, const at::Tensor& rows) const {
  const auto r = rotation(u);
  auto inside = at::linear(rows, u.source, u.bias);
  if (own().variant != "direft") inside = inside - at::linear(rows, r);
  auto change = inside.mm(r);
  if (is_training() && own().dropout > 0) change = at::dropout(change, own().dropout, true);
  return rows + change;
}

at::Tensor Reft::edit(at::Tensor stream, const Sequences& sequences) const {
  if (!sequences.from_start) return stream;
  std::vector<int64_t> first, last;
  for (size_t s = 0; s + 1 < sequences.cu.size(); ++s) {
    const int64_t begin = sequences.cu[s] + (sequences.padding.empty() ? 0 : sequences.padding[s]);
    const int64_t n = sequences.prompt.empty() ? sequences.cu[s + 1] - begin : sequences.prompt[s];
    const int64_t p = std::min(own().prefix_positions, n);
    const int64_t q = std::min(own().suffix_positions, n - p);
    for (int64_t i = 0; i < p; ++i) first.push_back(begin + i);
    for (int64_t i = n - q; i < n; ++i) last.push_back(begin + i);
  }
  const auto dtype = stream.scalar_type();
  const auto sizes = stream.sizes().vec();
  auto rows = stream.reshape({-1, sizes.back()});
  const auto apply = [&](const Unit& u, const std::vector<int64_t>& where) {
    if (where.empty()) return;
    const auto index = at::tensor(where, at::TensorOptions().dtype(at::kLong)).to(rows.device());
    const auto chosen = rows.index_select(0, index).to(u.free.scalar_type());
    rows = rows.index_copy(0, index, edited(u, chosen).to(dtype));
  };
  apply(units_.front(), first);
  apply(units_.back(), last);
  return rows.reshape(sizes);
}

AdapterState Reft::state() const {
  at::NoGradGuard no_grad;
  AdapterState all;
  for (const auto& u : units_) {
    auto kept = u.rotate;
    kept.copy_(rotation(u).t());
    all.emplace_back(u.name + ".rotate_layer", u.rotate);
    all.emplace_back(u.name + ".learned_source.weight", u.source);
    all.emplace_back(u.name + ".learned_source.bias", u.bias);
  }
  return all;
}

AdapterState Reft::private_state() const {
  AdapterState all;
  for (const auto& u : units_) all.emplace_back(u.name + ".free", u.free);
  return all;
}

void Reft::loaded(const std::vector<std::string>& found) {
  // R itself is a start for F as good as the one it came from.
  at::NoGradGuard no_grad;
  if (found.size() >= units_.size()) return;
  for (auto& u : units_) u.free.copy_(u.rotate.t());
}

std::vector<at::Tensor> Reft::trained() const {
  std::vector<at::Tensor> all;
  for (const auto& u : units_)
    for (const auto& t : {u.free, u.source, u.bias}) all.push_back(t);
  return all;
}

int64_t Reft::rank() const {
  return own().r;
}

namespace {

std::vector<Grafted> make(const std::shared_ptr<const AdapterConfig>& config,
                          const std::vector<Place>& places, uint64_t) {
  const auto own = own_config<ReftConfig>(config);
  std::vector<Grafted> made;
  std::vector<int64_t> found;
  for (size_t i = 0; i < places.size(); ++i) {
    const auto& place = places[i];
    if (place.kind != SlotKind::block || place.part != "feed_forward") continue;
    if (own->layers &&
        std::find(own->layers->begin(), own->layers->end(), place.layer) == own->layers->end())
      continue;
    found.push_back(place.layer);
    made.push_back({i, std::make_shared<Reft>(own, place.hidden, place.seed)});
  }
  if (own->layers)
    for (const auto layer : *own->layers)
      if (std::find(found.begin(), found.end(), layer) == found.end())
        throw Error("inject",
                    fmt::format("layers has {}, and this model has no such layer", layer));
  return made;
}

const bool registered = register_method("REFT", {.make = make});

}  // namespace
}  // namespace budwood
