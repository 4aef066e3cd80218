#include <budwood/peft/json.h>
#include <budwood/peft/methods/bottleneck_config.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace budwood {
namespace {

const std::vector<std::string> kActivations = {
    "relu", "gelu",  "gelu_new",  "gelu_orig",  "silu", "swish",    "tanh",  "sigmoid",
    "elu",  "relu6", "leakyrelu", "quick_gelu", "mish", "softplus", "linear"};

const bool registered[] = {
    register_config("BOTTLENECK", [] { return std::make_shared<BottleneckConfig>(); }),
    register_config("PARALLEL_ADAPTER", [] { return std::make_shared<ParallelAdapterConfig>(); }),
    register_config("COMPACTER", [] { return std::make_shared<CompacterConfig>(); })};

ConfigField reduction_field(double& one, PatternMap<double>& map) {
  return {"reduction_factor",
          [&](const Json& value) -> const char* {
            if (value.is_object()) return read_value(value, map);
            map.clear();
            return read_value(value, one);
          },
          [&]() -> Json {
            if (map.empty()) return write_number(one);
            return write_value(map);
          }};
}

ConfigField scaling_field(std::variant<double, std::string>& scaling) {
  return {"scaling",
          [&](const Json& value) -> const char* {
            if (value.is_number()) return scaling = value.get<double>(), nullptr;
            if (value.is_string()) return scaling = value.get<std::string>(), nullptr;
            return "a number, \"learned\" or \"channel\"";
          },
          [&]() -> Json {
            if (const auto* number = std::get_if<double>(&scaling)) return *number;
            return std::get<std::string>(scaling);
          }};
}

ConfigField layers_field(std::vector<int64_t>& layers) {
  return {"leave_out",
          [&](const Json& value) -> const char* {
            std::optional<std::vector<int64_t>> list;
            const auto* fault = read_value(value, list);
            if (!fault) layers = list.value_or(std::vector<int64_t>{});
            return fault;
          },
          [&]() -> Json { return layers; }};
}

}  // namespace

BottleneckConfig BottleneckConfig::houlsby() {
  BottleneckConfig config;
  config.mh_adapter = true;
  config.original_ln_before = false;
  config.non_linearity = "swish";
  return config;
}

ParallelAdapterConfig::ParallelAdapterConfig() : BottleneckConfig("PARALLEL_ADAPTER") {
  is_parallel = true;
  reduction_factor = 2;
  scaling = 4.0;
  original_ln_before = false;
  init_weights = "mam_adapter";
}

CompacterConfig::CompacterConfig() : BottleneckConfig("COMPACTER") {
  mh_adapter = true;
  original_ln_before = false;
  reduction_factor = 32;
  non_linearity = "gelu";
  phm_layer = true;
}

int64_t BottleneckConfig::width(int64_t layer, int64_t hidden) const {
  double factor = reduction_factor;
  if (!reduction_factors.empty()) {
    const auto find = [&](const std::string& key) -> const double* {
      for (const auto& [name, value] : reduction_factors)
        if (name == key) return &value;
      return nullptr;
    };
    const auto* here = find(std::to_string(layer));
    if (!here) here = find("default");
    if (!here)
      throw Error(peft_type + " config",
                  fmt::format("reduction_factor has neither \"{}\" nor \"default\"", layer));
    factor = *here;
  }
  return std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(hidden) / factor));
}

bool BottleneckConfig::leaves_out(int64_t layer) const {
  return std::find(leave_out.begin(), leave_out.end(), layer) != leave_out.end();
}

void BottleneckConfig::validate(Strictness strictness) const {
  AdapterConfig::validate(strictness);
  const auto check_factor = [&](const std::string& name, double value) {
    require_option(*this, std::isfinite(value) && value > 0, name, fmt::format("{}", value),
                   "a number above 0");
  };
  check_factor("reduction_factor", reduction_factor);
  for (const auto& [layer, value] : reduction_factors)
    check_factor("reduction_factor[" + layer + "]", value);
  require_option(*this, mh_adapter || output_adapter, "output_adapter", "false",
                 "true when mh_adapter is false: else there is no place for an adapter");
  require_one_of(*this, "non_linearity", non_linearity, kActivations);
  require_one_of(*this, "init_weights", init_weights,
                 {"identity", "bert", "mam_adapter", "houlsby"});
  require_probability(*this, "dropout", dropout);
  require_probability(*this, "stochastic_depth", stochastic_depth);
  if (const auto* text = std::get_if<std::string>(&scaling))
    require_one_of(*this, "scaling", *text, {"learned", "channel"});
  else
    require_finite(*this, "scaling", std::get<double>(scaling));
  if (const auto* text = std::get_if<std::string>(&residual_before_ln))
    require_one_of(*this, "residual_before_ln", *text, {"post_add"});
  if (!phm_layer) return;
  require_at_least(*this, "phm_dim", phm_dim, 1);
  require_at_least(*this, "phm_rank", phm_rank, 1);
  require_one_of(*this, "phm_c_init", phm_c_init, {"normal", "uniform"});
  require_one_of(*this, "hypercomplex_nonlinearity", hypercomplex_nonlinearity,
                 {"glorot-uniform", "glorot-normal", "normal"});
  require_option(*this, !factorized_phm_rule, "factorized_phm_rule", "true",
                 "false: a factorised rule is not available in this version");
}

std::vector<ConfigField> BottleneckConfig::fields() {
  auto all = AdapterConfig::fields();
  for (auto& field : std::vector<ConfigField>{
           bind_field("mh_adapter", mh_adapter),
           bind_field("output_adapter", output_adapter),
           reduction_field(reduction_factor, reduction_factors),
           bind_field("non_linearity", non_linearity),
           bind_field("is_parallel", is_parallel),
           scaling_field(scaling),
           bind_field("original_ln_before", original_ln_before),
           bind_field("original_ln_after", original_ln_after),
           bind_field("residual_before_ln", residual_before_ln),
           bind_field("ln_before", ln_before),
           bind_field("ln_after", ln_after),
           bind_field("adapter_residual_before_ln", adapter_residual_before_ln),
           bind_field("use_gating", use_gating),
           bind_field("dropout", dropout),
           bind_field("stochastic_depth", stochastic_depth),
           layers_field(leave_out),
           bind_field("init_weights", init_weights),
           bind_field("phm_layer", phm_layer),
           bind_field("phm_dim", phm_dim),
           bind_field("phm_rank", phm_rank),
           bind_field("phm_bias", phm_bias),
           bind_field("learn_phm", learn_phm),
           bind_field("factorized_phm_W", factorized_phm_W),
           bind_field("shared_W_phm", shared_W_phm),
           bind_field("shared_phm_rule", shared_phm_rule),
           bind_field("factorized_phm_rule", factorized_phm_rule),
           bind_field("phm_c_init", phm_c_init),
           bind_field("phm_init_range", phm_init_range),
           bind_field("hypercomplex_nonlinearity", hypercomplex_nonlinearity)})
    all.push_back(std::move(field));
  return all;
}

}  // namespace budwood
