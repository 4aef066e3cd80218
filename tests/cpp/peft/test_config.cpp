#include <budwood/peft/config.h>
#include <budwood/peft/json.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

using namespace budwood;
using List = std::vector<std::string>;

namespace {

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

std::string refusal(const LoraConfig& config) {
  return message_of([&] { config.validate(); });
}

std::string refusal(const std::string& text, Strictness strictness = Strictness::strict) {
  return message_of([&] { parse_adapter_config(text, strictness); });
}

bool says(const std::string& message, const std::string& part) {
  return message.find(part) != std::string::npos;
}

std::shared_ptr<LoraConfig> parse_lora(const std::string& text) {
  return std::dynamic_pointer_cast<LoraConfig>(parse_adapter_config(text, Strictness::strict));
}

struct SeriesConfig : AdapterConfig {
  SeriesConfig() : AdapterConfig("TEST_SERIES") {}
  int64_t reduction = 16;
  std::shared_ptr<AdapterConfig> clone() const override {
    return std::make_shared<SeriesConfig>(*this);
  }
  std::vector<ConfigField> fields() override {
    auto all = AdapterConfig::fields();
    all.push_back(bind_field("reduction", reduction));
    return all;
  }
};

}  // namespace

TEST_CASE("an empty LORA file has HF PEFT's defaults") {
  const auto config = parse_lora(R"({"peft_type": "LORA"})");
  REQUIRE(config);
  CHECK(config->r == 8);
  CHECK(config->lora_alpha == 8);
  CHECK(config->lora_dropout == 0.0);
  CHECK(config->bias == "none");
  CHECK_FALSE(config->use_rslora);
  CHECK(config->identity_init());
  CHECK_FALSE(config->gaussian_init());
  CHECK(std::holds_alternative<std::monostate>(config->target_modules));
  CHECK(config->to_json() == LoraConfig().to_json());
}

TEST_CASE("members are set as a C++ program sets them") {
  LoraConfig config;
  config.target_modules = "all-linear";
  config.layers_to_transform = {};
  config.init_lora_weights = false;
  config.task_type = "CAUSAL_LM";
  CHECK_NOTHROW(config.validate());
  CHECK_FALSE(config.identity_init());
  config.target_modules = List{"v", "q", "v"};
  config.layers_to_transform = 3;
  CHECK(says(config.to_json(), "\"target_modules\": [\n    \"q\",\n    \"v\"\n  ]"));
  CHECK(says(config.to_json(), "\"layers_to_transform\": 3"));
  const auto back = parse_adapter_config(config.to_json(), Strictness::strict);
  CHECK(back->to_json() == config.to_json());
  CHECK(config.clone()->to_json() == config.to_json());
}

TEST_CASE("JSON is laid out as Python's json.dumps(indent=2, sort_keys=True) lays it out") {
  const auto value = parse_ordered_json(
      R"({"b": [], "a": {}, "é": "\u2028😀\u007f\"\\/\n", "n": [1.0, 1e-5, 1e16, 1e15, 0.1, -0.0, 3, true, null]})",
      "text");
  CHECK(dump_like_python(value) ==
        "{\n  \"a\": {},\n  \"b\": [],\n  \"n\": [\n    1.0,\n    1e-05,\n    1e+16,\n"
        "    1000000000000000.0,\n    0.1,\n    -0.0,\n    3,\n    true,\n    null\n  ],\n"
        "  \"\\u00e9\": \"\\u2028\\ud83d\\ude00\\u007f\\\"\\\\/\\n\"\n}");
}

TEST_CASE("patterns keep the order of the file") {
  const auto config =
      parse_lora(R"({"peft_type": "LORA", "rank_pattern": {"z": 1, "a": 2, "m": 3}})");
  CHECK(config->rank_pattern[0].first == "z");
  CHECK(config->rank_pattern[2].first == "m");
  CHECK(all_fields(*config)["rank_pattern"].dump() == R"({"z":1,"a":2,"m":3})");
}

TEST_CASE("rank, alpha and scale follow the first pattern that matches") {
  LoraConfig config;
  config.r = 4;
  config.use_rslora = true;
  config.rank_pattern = {{"layers.0.*q_proj", 2}, {"down_proj", 6}};
  config.alpha_pattern = {{"down_proj", 3}};
  const std::string layer = "model.layers.";
  CHECK(config.scaling(layer + "0.self_attn.q_proj") == doctest::Approx(5.656854).epsilon(1e-6));
  CHECK(config.scaling(layer + "0.mlp.down_proj") == doctest::Approx(1.2247449).epsilon(1e-6));
  CHECK(config.scaling(layer + "1.self_attn.q_proj") == 4.0);
  CHECK(config.rank(layer + "1.mlp.updown_proj") == 4);
  config.rank_pattern = {{"q_proj", 2}, {".*q_proj", 3}};
  CHECK(config.rank("m.q_proj") == 2);
}

TEST_CASE("patterns that sorting would change are pinned to their paths") {
  LoraConfig config;
  config.rank_pattern = {{"q_proj", 2}, {".*q_proj", 3}};
  config.alpha_pattern = {{"q_proj", 5}};
  config.pin_patterns({"a.q_proj", "b.xq_proj", "c"});
  CHECK(config.rank_pattern == PatternMap<int64_t>{{"^a\\.q_proj", 2}, {"^b\\.xq_proj", 3}});
  CHECK(config.alpha_pattern == PatternMap<double>{{"q_proj", 5}});
  CHECK(config.rank("x.a.q_proj") == 8);
}

TEST_CASE("values that mean nothing are named") {
  const auto with = [](auto change) {
    LoraConfig config;
    change(config);
    return refusal(config);
  };
  CHECK(says(with([](auto& c) { c.r = 0; }), "r is 0"));
  CHECK(says(with([](auto& c) { c.lora_alpha = NAN; }), "lora_alpha is nan"));
  CHECK(says(with([](auto& c) { c.lora_alpha = INFINITY; }), "lora_alpha is inf"));
  CHECK(says(with([](auto& c) { c.lora_dropout = 1; }), "lora_dropout is 1"));
  CHECK(says(with([](auto& c) { c.bias = "most"; }), "bias is 'most'"));
  CHECK(says(with([](auto& c) { c.task_type = "LM"; }), "task_type is 'LM'"));
  CHECK(says(with([](auto& c) { c.rank_pattern = {{"a", -2}}; }), "rank_pattern['a'] is -2"));
  CHECK(says(with([](auto& c) { c.rank_pattern = {{"(", 2}}; }), "'('"));
  CHECK(says(with([](auto& c) { c.target_modules = "*"; }), "'*'"));
  CHECK(says(with([](auto& c) { c.layers_pattern = "h"; }), "needs layers_to_transform"));
  CHECK(says(with([](auto& c) { c.target_modules = "a", c.layers_to_transform = 1; }), "a text"));
  CHECK(says(with([](auto& c) { c.ensure_weight_tying = true; }),
             "ensure_weight_tying is true; this is not available"));
  CHECK(says(with([](auto& c) { c.use_qalora = c.use_dora = true; }),
             "cannot be used with use_dora"));
  CHECK(says(with([](auto& c) { c.use_qalora = true, c.qalora_group_size = 0; }),
             "qalora_group_size is 0"));
  CHECK(says(with([](auto& c) { c.use_qalora = true, c.qalora_pooling = "max"; }),
             "qalora_pooling is 'max'"));
  CHECK(
      says(with([](auto& c) { c.init_lora_weights = "loftq"; }), "init_lora_weights is \"loftq\""));
  CHECK(says(with([](auto& c) { c.lora_bias = c.use_dora = true; }), "lora_bias cannot be used"));
}

TEST_CASE("wrong JSON types are named with the type that is wanted") {
  const auto of = [](const std::string& option) {
    return refusal("{\"peft_type\": \"LORA\", " + option + "}");
  };
  CHECK(says(of(R"("r": 8.5)"), "r is 8.5; it must be an integer"));
  CHECK(
      says(of(R"("r": 18446744073709551615)"), "r is 18446744073709551615; it must be an integer"));
  CHECK(says(of(R"("use_rslora": "yes")"), "use_rslora is \"yes\"; it must be true or false"));
  CHECK(says(of(R"("target_modules": {"a": 1})"), "it must be a list of names, a text or null"));
  CHECK(says(of(R"("alpha_pattern": {"a": "b"})"), "it must be an object of pattern: number"));
  CHECK(
      says(of(R"("layers_to_transform": [0, true])"), "it must be an integer, a list of integers"));
  CHECK(says(of(R"("loftq_config": 3)"), "loftq_config is 3; it must be an object or null"));
  CHECK(says(of(R"("layer_replication": [[0]])"), "it must be a list of [begin, end]"));
  CHECK(says(of(R"("bias": null)"), "bias is null; it must be a text"));
}

TEST_CASE("unknown keys are errors for a person and warnings for a file") {
  const std::string text = R"({"peft_type": "LORA", "lora_alfa": 4, "budwood.x": [1]})";
  CHECK(says(refusal(text), "no option 'lora_alfa'; the nearest is 'lora_alpha'"));
  const auto config = parse_adapter_config(text, Strictness::lenient);
  REQUIRE(config->warnings.size() == 1);
  CHECK(says(config->warnings[0], "'lora_alfa' = 4"));
  CHECK(config->private_keys.at("budwood.x") == "[1]");
  CHECK(says(config->to_json(), "\"budwood.x\": [\n    1\n  ]"));
}

TEST_CASE("files of other projects are told apart") {
  const std::string hub = R"({"config": {"architecture": "lora"}, "version": "adapters.1.3.0"})";
  const std::string mlx = R"({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}})";
  CHECK(config_kind(hub) == ConfigKind::adapterhub);
  CHECK(config_kind(mlx) == ConfigKind::mlx);
  CHECK(config_kind(R"({"peft_type": "X"})") == ConfigKind::peft);
  CHECK(config_kind(R"({"config": {}, "version": "1.0"})") == ConfigKind::unknown);
  CHECK(config_kind("[]") == ConfigKind::unknown);
  CHECK(says(refusal(hub), "AdapterHub"));
  CHECK(says(refusal(mlx), "MLX"));
  CHECK(says(refusal("{}"), "has no peft_type"));
  CHECK(says(refusal(R"({"peft_type": "MAGIC"})"), "has peft_type \"MAGIC\"; known are"));
}

TEST_CASE("a method adds itself without any change elsewhere") {
  CHECK(register_config("TEST_SERIES", [] { return std::make_shared<SeriesConfig>(); }));
  CHECK_FALSE(register_config("LORA", [] { return std::make_shared<LoraConfig>(); }));
  const auto config =
      parse_adapter_config(R"({"peft_type": "TEST_SERIES", "reduction": 4})", Strictness::strict);
  CHECK(std::dynamic_pointer_cast<SeriesConfig>(config)->reduction == 4);
  CHECK(says(refusal(R"({"peft_type": "TEST_SERIES", "r": 4})"), "no option 'r'"));
  CHECK_FALSE(config->target_rules().has_value());
}

TEST_CASE("one option is set by name") {
  LoraConfig config;
  set_field(config, "r", 16);
  CHECK(config.r == 16);
  CHECK(says(message_of([&] { set_field(config, "rank", 16); }), "no option 'rank'"));
  CHECK(says(message_of([&] { set_field(config, "r", "16"); }), "r is \"16\""));
  CHECK(config.r == 16);
}

TEST_CASE("hostile texts end in an Error") {
  CHECK(says(refusal(R"({"peft_type": "LORA", "r": 1, "r": 2})"), "twice"));
  CHECK_FALSE(refusal("{\"peft_type\": \"LORA\", \"revision\": \"\xff\"}").empty());
  CHECK_FALSE(refusal(std::string(100000, '[')).empty());
  std::string many = R"({"peft_type": "LORA", "rank_pattern": {)";
  for (int i = 0; i < 30000; ++i) many += (i ? ",\"" : "\"") + std::to_string(i) + "\": 1";
  CHECK(says(refusal(many + "}}"), "30000 keys"));
  const std::string longest(5000, 'x');
  CHECK(refusal("{\"peft_type\": \"LORA\", \"" + longest + "\": \"" + longest + "\"}").size() <
        1000);
  LoraConfig config;
  config.revision = "\xff";
  CHECK_THROWS_AS(config.to_json(), Error);
}

TEST_CASE("a folder is written and read back") {
  const auto folder = std::filesystem::temp_directory_path() / "budwood_test_config" / "deep";
  std::filesystem::remove_all(folder.parent_path());
  LoraConfig config;
  config.r = 5;
  save_adapter_config(config, folder);
  CHECK(load_adapter_config(folder)->to_json() == config.to_json());
  std::ifstream file(folder / "adapter_config.json", std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  CHECK(text == config.to_json());
  CHECK(text.back() == '}');
  CHECK(says(message_of([&] { load_adapter_config(folder / "no"); }), "nothing is downloaded"));
  CHECK_THROWS_AS(save_adapter_config(config, folder / "adapter_config.json"), Error);
  config.r = 0;
  CHECK_THROWS_AS(save_adapter_config(config, folder), Error);
  CHECK(load_adapter_config(folder)->to_json() == text);
  std::filesystem::remove_all(folder.parent_path());
}
