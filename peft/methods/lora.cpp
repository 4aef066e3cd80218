#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/kernels/fold.h>
#include <budwood/peft/method.h>
#include <budwood/peft/methods/lora.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/svd.h>
#include <budwood/quant/error.h>
#include <budwood/quant/memory_pool.h>
#include <budwood/quant/ops.h>
#include <algorithm>
#include <cmath>

namespace budwood {
namespace {

at::Tensor initial_a(const LoraConfig& config, int64_t rank, int64_t in, at::Generator generator) {
  auto a = at::empty({rank, in}, at::kFloat);
  if (config.gaussian_init()) return a.normal_(0.0, 1.0 / static_cast<double>(rank), generator);
  const double bound = 1.0 / std::sqrt(static_cast<double>(in));
  return a.uniform_(-bound, bound, generator);
}

// A₀ and B₀ with s B₀ A₀ the part of W that an adapter starts from.
std::pair<at::Tensor, at::Tensor> principal_factors(const LoraConfig::Principal& how,
                                                    const quant::Weight& weight, int64_t rank,
                                                    double scaling, at::Generator generator) {
  const auto w = weight.rows(0, weight.out, at::kFloat);
  if (rank > std::min(weight.out, weight.in))
    throw Error("inject", fmt::format("the rank {} is above the smaller side of a weight of [{}, "
                                      "{}], which init_lora_weights decomposes",
                                      rank, weight.out, weight.in));
  if (how.orthonormal) {
    const auto [q, r] = at::linalg_qr(w);
    return {r.narrow(0, 0, rank).clone(), q.narrow(1, 0, rank).clone()};
  }
  at::Tensor u, s, v;
  if (how.iterations) {
    const auto found = leading_triplets(w, rank, *how.iterations, generator);
    std::tie(u, s, v) = std::tie(found.u, found.s, found.vt);
  } else {
    std::tie(u, s, v) = at::linalg_svd(w, /*full_matrices=*/false);
    u = u.narrow(1, 0, rank);
    s = s.narrow(0, 0, rank);
    v = v.narrow(0, 0, rank);
  }
  const auto root = (s / scaling).sqrt();
  return {(root.unsqueeze(1) * v).contiguous(), (u * root).contiguous()};
}

}  // namespace

namespace {

// Calls use(rows [n, in] in the dtype, number of the first) for the whole weight.
template <class Use>
void for_panels(const quant::Weight& weight, at::ScalarType dtype, const Use& use) {
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 18) / weight.in);
  for (int64_t begin = 0; begin < weight.out; begin += step)
    use(weight.rows(begin, std::min(weight.out, begin + step), dtype), begin);
}

// The squares of norms that a sum of three terms cannot give, in fp64, one of [rows or columns].
at::Tensor exact_square(const quant::Weight& weight, DoraNorms::Along along, int64_t which,
                        const at::Tensor& a, const at::Tensor& b, double s) {
  const auto delta = s * b.narrow(0, which, 1).to(at::kDouble).mm(a.to(at::kDouble)).flatten();
  if (along == DoraNorms::Along::rows) {
    const auto w = weight.rows(which, which + 1, at::kDouble).flatten();
    return (w + delta).square().sum();
  }
  auto sum = at::zeros({}, at::kDouble);
  for_panels(weight, at::kDouble, [&](const at::Tensor& rows, int64_t begin) {
    sum += (rows.select(1, which) + delta.narrow(0, begin, rows.size(0))).square().sum();
  });
  return sum;
}

}  // namespace

DoraNorms::DoraNorms(const quant::Weight& weight, Along along)
    : along_(along), weight_(weight.parts[0].unsafeGetTensorImpl()) {
  at::NoGradGuard no_grad;
  if (along == Along::rows) {
    std::vector<at::Tensor> sums;
    for_panels(weight, at::kFloat,
               [&](const at::Tensor& rows, int64_t) { sums.push_back(rows.square().sum(1)); });
    squares_ = at::cat(sums);
  } else {
    auto sums = at::zeros({weight.in}, at::kDouble);
    for_panels(weight, at::kFloat,
               [&](const at::Tensor& rows, int64_t) { sums += rows.square().sum(0); });
    squares_ = sums.to(at::kFloat);
  }
  // Panels leave holes between the small tensors of adapters, which stay.
  quant::trim_heap_after(weight.out * weight.in * int64_t{4});
}

at::Tensor DoraNorms::of(const quant::Weight& weight, const at::Tensor& a, const at::Tensor& b,
                         double s, bool remember) const {
  at::NoGradGuard no_grad;
  if (weight.parts[0].unsafeGetTensorImpl() != weight_)
    return DoraNorms(weight, along_).computed(weight, a, b, s);
  const std::lock_guard lock(mutex_);
  if (!remember) {
    remembered_.reset();
    return computed(weight, a, b, s);
  }
  if (!remembered_ || remembered_->scaling != s || remembered_->a.device() != a.device() ||
      !remembered_->a.equal(a) || !remembered_->b.equal(b))
    remembered_ = Remembered{a.clone(), b.clone(), computed(weight, a, b, s), s};
  return remembered_->norms;
}

at::Tensor DoraNorms::computed(const quant::Weight& weight, const at::Tensor& a,
                               const at::Tensor& b, double s) const {
  // Below this share of W's own norm the sum of three terms has lost its digits.
  constexpr double kCancelled = 0.01;
  // W Aᵀ [out, r], or Wᵀ Aᵀ [in, r].
  const auto wa = (along_ == Along::rows ? weight.linear(a) : weight.backward_input(a)).t();
  auto squares = squares_ + 2 * s * (wa * b).sum(1) + s * s * (b.mm(a.mm(a.t())) * b).sum(1);
  const auto lost = (squares < kCancelled * squares_).nonzero().flatten();
  for (int64_t i = 0; i < lost.size(0); ++i) {
    const auto which = lost[i].item<int64_t>();
    squares[which] = exact_square(weight, along_, which, a, b, s).to(at::kFloat);
  }
  return squares.clamp_min_(0).sqrt_();
}

Lora::Lora(std::shared_ptr<const LoraConfig> config, const LinearBase& base,
           const std::string& path, uint64_t seed)
    : LinearAdapter(config), scaling_(config->scaling(path)), dropout_(config->lora_dropout) {
  const auto& weight = base.weight;
  const int64_t rank = config->rank(path);
  auto generator = stream(seed);
  at::Tensor a, b;
  if (const auto principal = config->principal_init()) {
    std::tie(a, b) = principal_factors(*principal, weight, rank, scaling_, generator);
    start_a_ = register_buffer("start_A", a.clone());
    start_b_ = register_buffer("start_B", b.clone());
  } else {
    if (config->use_qalora && weight.in % config->qalora_group_size != 0)
      throw Error("inject", fmt::format("{}: qalora_group_size {} does not divide its {} inputs",
                                        path, config->qalora_group_size, weight.in));
    const int64_t seen = config->use_qalora ? weight.in / config->qalora_group_size : weight.in;
    a = initial_a(*config, rank, seen, generator);
    b = at::zeros({weight.out, rank}, at::kFloat);
    // init_lora_weights=False asks for a start that is not the identity; only tests want it.
    if (!config->identity_init()) b.normal_(0.0, 0.02, generator);
  }
  lora_a_ = register_parameter("lora_A", a);
  lora_b_ = register_parameter("lora_B", b);
  if (config->lora_bias)
    bias_ = register_parameter("lora_B_bias", at::zeros({weight.out}, at::kFloat));
  if (config->use_dora) {
    norms_.emplace(weight, DoraNorms::Along::rows);
    const auto taken = start_a_.defined() ? at::zeros_like(b) : b;
    magnitude_ = register_parameter("lora_magnitude_vector",
                                    norms_->of(weight, a.detach(), taken.detach(), scaling_));
  }
}

const LoraConfig& Lora::own() const {
  return static_cast<const LoraConfig&>(*config());
}

LinearTerm Lora::term(const LinearBase& base) const {
  LinearTerm term{.a = lora_a_, .b = lora_b_, .scaling = scaling_, .inner_bias = bias_};
  if (start_a_.defined()) {
    term.a = at::cat({lora_a_, start_a_});
    term.b = at::cat({lora_b_, -start_b_}, 1);
  }
  if (own().use_qalora) {
    term.a = lora_a_.repeat_interleave(own().qalora_group_size, 1);
    term.scaling *= own().qalora_factor(base.weight.in);
  }
  if (is_training()) term.dropout = dropout_;
  if (norms_) {
    term.gain = magnitude_ / norms_->of(base.weight, term.a.detach(), term.b.detach(), scaling_,
                                        /*remember=*/!is_training());
    term.gain_spares_bias = true;
    term.magnitude = magnitude_;
  }
  return term;
}

AdapterState Lora::state() const {
  AdapterState tensors = {{"lora_A.weight", lora_a_}, {"lora_B.weight", lora_b_}};
  if (bias_.defined()) tensors.emplace_back("lora_B.bias", bias_);
  if (magnitude_.defined()) tensors.emplace_back("lora_magnitude_vector", magnitude_);
  return tensors;
}

AdapterState Lora::private_state() const {
  if (!start_a_.defined()) return {};
  return {{"start_A", start_a_}, {"start_B", start_b_}};
}

void Lora::loaded(const std::vector<std::string>& found) {
  // A full decomposition gives the start again; a randomised one does not.
  const auto principal = own().principal_init();
  if (principal && principal->iterations && found.size() < 2)
    throw Error("load_adapter",
                "an adapter that started from a randomised decomposition of the base needs that "
                "start (budwood.*.start_A and start_B), and the file does not have it");
}

std::string Lora::trained_bias() const {
  return own().bias;
}

bool Lora::starts_as_identity() const {
  return own().identity_init() && !own().principal_init() && !norms_;
}

LoraEmbedding::LoraEmbedding(std::shared_ptr<const LoraConfig> config, const quant::Weight& table,
                             const std::string& path, uint64_t seed)
    : EmbeddingAdapter(config), scaling_(config->scaling(path)) {
  if (config->use_qalora)
    throw Error("inject", path + ": use_qalora is for projections, not for token tables");
  const int64_t rank = config->rank(path);
  auto generator = stream(seed);
  auto a = at::zeros({rank, table.out}, at::kFloat);
  if (!config->identity_init()) a.normal_(0.0, 0.02, generator);
  lora_a_ = register_parameter("lora_embedding_A", a);
  lora_b_ = register_parameter(
      "lora_embedding_B", at::empty({table.in, rank}, at::kFloat).normal_(0.0, 1.0, generator));
  if (!config->use_dora) return;
  norms_.emplace(table, DoraNorms::Along::columns);
  magnitude_ = register_parameter("lora_magnitude_vector",
                                  norms_->of(table, lora_a_.detach(), lora_b_.detach(), scaling_));
}

at::Tensor LoraEmbedding::gain(const quant::Weight& table) const {
  return magnitude_ / norms_->of(table, lora_a_.detach(), lora_b_.detach(), scaling_,
                                 /*remember=*/!is_training());
}

at::Tensor LoraEmbedding::forward(const quant::Weight& table, const at::Tensor& ids,
                                  at::Tensor rows) const {
  const auto chosen = at::embedding(lora_a_.t(), ids);
  const auto added = at::linear(chosen, lora_b_) * scaling_;
  if (!norms_) return rows + added.to(rows.scalar_type());
  return ((rows + added) * gain(table)).to(rows.scalar_type());
}

at::Tensor LoraEmbedding::fold_rows(const quant::Weight& table, at::Tensor rows,
                                    int64_t begin) const {
  const auto plain = [](const at::Tensor& t) {
    return t.detach().to(at::kCPU, at::kFloat).contiguous();
  };
  const auto a = plain(lora_a_), b = plain(lora_b_);
  const int64_t rank = a.size(0);
  kernels::add_product(rows.mutable_data_ptr<double>(), rows.size(0), rows.size(1),
                       {a.const_data_ptr<float>() + begin, 1, a.size(1)},
                       {b.const_data_ptr<float>(), rank, 1, scaling_}, rank);
  return norms_ ? rows * gain(table).to(at::kCPU, at::kDouble) : rows;
}

AdapterState LoraEmbedding::state() const {
  AdapterState tensors = {{"lora_embedding_A", lora_a_}, {"lora_embedding_B", lora_b_}};
  if (magnitude_.defined()) tensors.emplace_back("lora_magnitude_vector", magnitude_);
  return tensors;
}

bool LoraEmbedding::starts_as_identity() const {
  return static_cast<const LoraConfig&>(*config()).identity_init() && !norms_;
}

namespace {

std::vector<Grafted> make(const std::shared_ptr<const AdapterConfig>& config,
                          const std::vector<Place>& places, uint64_t) {
  const auto own = own_config<LoraConfig>(config);
  std::vector<Grafted> made;
  for (size_t i = 0; i < places.size(); ++i) {
    const auto& place = places[i];
    if (place.kind == SlotKind::embedding) {
      made.push_back(
          {i, std::make_shared<LoraEmbedding>(own, place.base.weight, place.path, place.seed)});
      continue;
    }
    require_kind(place, SlotKind::linear, "LORA");
    made.push_back({i, std::make_shared<Lora>(own, place.base, place.path, place.seed)});
  }
  return made;
}

const bool registered = register_method("LORA", {.make = make});

}  // namespace
}  // namespace budwood
