#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <budwood/peft/kernels/noise.h>
#include <budwood/peft/optim/mezo.h>
#include <budwood/quant/error.h>
#include <cmath>
#include <nlohmann/json.hpp>

namespace budwood::optim {
namespace {

constexpr const char* kFormat = "budwood.mezo";
constexpr int64_t kPiece = 4096;

kernels::NoiseKey key_of(const MezoLog& log, size_t tensor) {
  return {.seed = log.options.seed,
          .step = static_cast<uint32_t>(log.projected.size()),
          .stream = static_cast<uint32_t>(tensor)};
}

// use(values, z, count) for all elements of a contiguous tensor, in pieces on torch's threads.
template <class T, class Use>
void with_noise(const at::Tensor& p, const kernels::NoiseKey& key, const Use& use) {
  auto* data = p.mutable_data_ptr<T>();
  const int64_t pieces = (p.numel() + kPiece - 1) / kPiece;
  at::parallel_for(0, pieces, 4, [&](int64_t first, int64_t last) {
    float z[kPiece];
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece * kPiece, count = std::min(kPiece, p.numel() - begin);
      kernels::normal(key, static_cast<uint64_t>(begin), count, z);
      use(data + begin, z, count);
    }
  });
}

template <class Use>
void with_noise(const at::Tensor& p, const kernels::NoiseKey& key, const Use& use) {
  if (p.scalar_type() == at::kDouble)
    with_noise<double>(p, key, use);
  else
    with_noise<float>(p, key, use);
}

void check(const NamedTensors& parameters) {
  if (parameters.empty()) throw Error("Mezo", "there are no parameters to train");
  for (const auto& [path, p] : parameters) {
    if (p.scalar_type() != at::kFloat && p.scalar_type() != at::kDouble)
      throw Error("Mezo",
                  fmt::format("{} is {}, wanted float32: what is added to it would not come "
                              "off again. Load the model with dtype float32, or train an "
                              "adapter",
                              path, dtype_text(p.scalar_type())));
    if (!p.device().is_cpu() || !p.is_contiguous())
      throw Error("Mezo", fmt::format("{} is not a contiguous tensor on the CPU", path));
  }
}

}  // namespace

void MezoOptions::validate() const {
  if (!(eps > 0) || !std::isfinite(eps))
    throw Error("MezoOptions", fmt::format("eps is {}, wanted more than 0", eps));
  if (!(weight_decay >= 0) || !std::isfinite(weight_decay))
    throw Error("MezoOptions", fmt::format("weight_decay is {}, wanted at least 0", weight_decay));
}

Mezo::Mezo(NamedTensors parameters, MezoOptions options) : parameters_(std::move(parameters)) {
  options.validate();
  check(parameters_);
  log_.options = options;
  for (const auto& [path, p] : parameters_) {
    log_.names.push_back(path);
    log_.shapes.push_back(p.sizes().vec());
  }
}

void Mezo::add_noise(double scale) {
  for (size_t i = 0; i < parameters_.size(); ++i)
    with_noise(parameters_[i].second, key_of(log_, i), [&](auto* p, const float* z, int64_t n) {
      using T = std::remove_reference_t<decltype(*p)>;
      const T factor = static_cast<T>(scale);
      for (int64_t j = 0; j < n; ++j) p[j] += factor * z[j];
    });
}

// From θ - eps z: back to θ, decayed, and moved along z.
void Mezo::apply(double projected, double rate) {
  const auto& options = log_.options;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const auto& tensor = parameters_[i].second;
    const double keep = tensor.dim() >= 2 ? 1.0 - rate * options.weight_decay : 1.0;
    with_noise(tensor, key_of(log_, i), [&](auto* p, const float* z, int64_t n) {
      using T = std::remove_reference_t<decltype(*p)>;
      const T back = static_cast<T>(options.eps), kept = static_cast<T>(keep),
              step = static_cast<T>(rate * projected);
      for (int64_t j = 0; j < n; ++j) {
        const T restored = p[j] + back * z[j];
        p[j] = restored * kept - step * z[j];
      }
    });
  }
  log_.projected.push_back(projected);
  log_.rates.push_back(rate);
}

double Mezo::step(const std::function<double()>& loss, double rate) {
  const at::NoGradGuard no_grad;
  const double eps = log_.options.eps;
  double now = eps;  // times z is what the parameters are away from where they began
  const auto measured = [&] {
    const double value = loss();
    if (!std::isfinite(value))
      throw Error("Mezo", fmt::format("the loss is {} at a distance of {} z", value, now));
    return value;
  };
  add_noise(eps);
  try {
    const double above = measured();
    add_noise(-2 * eps);
    now = -eps;
    const double below = measured();
    apply((above - below) / (2 * eps), rate);
    return (above + below) / 2;
  } catch (...) {
    add_noise(-now);
    throw;
  }
}

void Mezo::replay(NamedTensors parameters, const MezoLog& log) {
  const at::NoGradGuard no_grad;
  Mezo run(std::move(parameters), log.options);
  for (size_t i = 0; i < std::max(log.names.size(), run.log_.names.size()); ++i) {
    if (i >= log.names.size() || i >= run.log_.names.size())
      throw Error("Mezo::replay", fmt::format("the run trained {} tensors, found {}",
                                              log.names.size(), run.log_.names.size()));
    if (log.names[i] != run.log_.names[i] || log.shapes[i] != run.log_.shapes[i])
      throw Error("Mezo::replay",
                  fmt::format("tensor {} of the run is {} {}, found {} {}", i, log.names[i],
                              io::shape_text(log.shapes[i]), run.log_.names[i],
                              io::shape_text(run.log_.shapes[i])));
  }
  for (size_t t = 0; t < log.projected.size(); ++t) {
    run.add_noise(log.options.eps);
    run.add_noise(-2 * log.options.eps);
    run.apply(log.projected[t], log.rates[t]);
  }
}

NamedTensors Mezo::state() const {
  return {{"mezo.projected", at::tensor(log_.projected, at::kDouble)},
          {"mezo.rates", at::tensor(log_.rates, at::kDouble)}};
}

void Mezo::restore(const NamedTensors& state) {
  MezoLog restored = log_;
  int found = 0;
  for (const auto& [name, tensor] : state) {
    if (name != "mezo.projected" && name != "mezo.rates") continue;
    const auto values = tensor.to(at::kDouble).contiguous();
    const auto* first = values.const_data_ptr<double>();
    auto& to = name == "mezo.rates" ? restored.rates : restored.projected;
    to.assign(first, first + values.numel());
    ++found;
  }
  if (found != 2 || restored.rates.size() != restored.projected.size())
    throw Error("Mezo::restore", "the state has no log of MeZO's steps");
  log_ = std::move(restored);
}

void MezoLog::save(const std::filesystem::path& path) const {
  const nlohmann::json about = {{"eps", options.eps},
                                {"weight_decay", options.weight_decay},
                                {"seed", options.seed},
                                {"names", names},
                                {"shapes", shapes}};
  write_tensors(path,
                {{"projected", at::tensor(projected, at::kDouble)},
                 {"rates", at::tensor(rates, at::kDouble)}},
                {{"format", "pt"}, {kFormat, about.dump()}});
}

MezoLog MezoLog::load(const std::filesystem::path& path) {
  const auto file = io::SafetensorsFile::open(path);
  const auto refuse = [&](const std::string& what) {
    return Error("MezoLog", fmt::format("{} is no log of a MeZO run: {}", path.string(), what));
  };
  MezoLog log;
  try {
    for (const auto& [key, value] : file.metadata())
      if (key == kFormat) {
        const auto about = nlohmann::json::parse(value);
        log.options.eps = about.at("eps").get<double>();
        log.options.weight_decay = about.at("weight_decay").get<double>();
        log.options.seed = about.at("seed").get<uint64_t>();
        log.names = about.at("names").get<std::vector<std::string>>();
        log.shapes = about.at("shapes").get<std::vector<std::vector<int64_t>>>();
      }
  } catch (const nlohmann::json::exception& e) {
    throw refuse(e.what());
  }
  if (log.names.empty() || log.names.size() != log.shapes.size())
    throw refuse(fmt::format("its metadata have no '{}' that names tensors", kFormat));
  log.options.validate();
  for (const char* name : {"projected", "rates"}) {
    const auto* info = file.find(name);
    if (info == nullptr || info->dtype != io::Dtype::f64 || info->shape.size() != 1)
      throw refuse(fmt::format("there is no tensor '{}' of float64", name));
    const auto values = as_tensor(*info);
    const auto* first = values.const_data_ptr<double>();
    auto& to = std::string(name) == "rates" ? log.rates : log.projected;
    to.assign(first, first + values.numel());
  }
  if (log.rates.size() != log.projected.size())
    throw refuse(fmt::format("{} steps have {} rates", log.projected.size(), log.rates.size()));
  for (size_t i = 0; i < log.rates.size(); ++i)
    if (!std::isfinite(log.rates[i]) || !std::isfinite(log.projected[i]))
      throw refuse(fmt::format("step {} is not finite", i));
  return log;
}

}  // namespace budwood::optim
