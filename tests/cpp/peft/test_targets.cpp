#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/targets.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>

#include <set>

using namespace budwood;
using List = std::vector<std::string>;

namespace {

bool says(const std::string& message, const std::string& part) {
  return message.find(part) != std::string::npos;
}

std::vector<ModuleInfo> llama(int layers) {
  std::vector<ModuleInfo> modules = {{"", ModuleKind::other}, {"model", ModuleKind::other}};
  modules.push_back({"model.embed_tokens", ModuleKind::embedding});
  for (int i = 0; i < layers; ++i) {
    const auto layer = "model.layers." + std::to_string(i);
    modules.push_back({layer + ".self_attn", ModuleKind::other});
    for (const char* name : {"q", "k", "v", "o"})
      modules.push_back({layer + ".self_attn." + name + "_proj", ModuleKind::linear});
    modules.push_back({layer + ".mlp", ModuleKind::other});
    for (const char* name : {"gate", "up", "down"})
      modules.push_back({layer + ".mlp." + name + "_proj", ModuleKind::linear});
  }
  modules.push_back({"lm_head", ModuleKind::linear, true});
  return modules;
}

LoraConfig targeting(Names names) {
  LoraConfig config;
  config.target_modules = std::move(names);
  return config;
}

std::string refusal(const LoraConfig& config, Strictness strictness = Strictness::strict) {
  try {
    match_targets(config, llama(2), "llama", strictness);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

}  // namespace

TEST_CASE("without target_modules the model type decides") {
  const auto report = match_targets(LoraConfig(), llama(2), "llama", Strictness::strict);
  CHECK(report.matched == List{"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj",
                               "model.layers.1.self_attn.q_proj",
                               "model.layers.1.self_attn.v_proj"});
  CHECK(std::get<List>(report.target_modules) == List{"q_proj", "v_proj"});
  CHECK(std::get<List>(*default_target_modules("IA3", "llama")) ==
        List{"k_proj", "v_proj", "down_proj"});
  CHECK(*default_feedforward_modules("llama") == List{"down_proj"});
  CHECK_FALSE(default_target_modules("ADALORA", "mistral").has_value());
}

TEST_CASE("all-linear leaves the output embedding out and is saved short when that is shorter") {
  const auto config = targeting("ALL-linear");
  const auto small = match_targets(config, llama(2), "llama", Strictness::strict);
  CHECK(small.matched.size() == 14);
  CHECK(std::get<List>(small.target_modules).size() == 14);
  const auto large = match_targets(config, llama(4), "llama", Strictness::strict);
  CHECK(large.matched.size() == 28);
  CHECK(std::get<List>(large.target_modules) ==
        List{"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"});
}

TEST_CASE("without an output embedding all-linear leaves the classification head out") {
  const std::vector<ModuleInfo> modules = {{"bert.pooler.dense", ModuleKind::linear},
                                           {"classifier", ModuleKind::linear}};
  const auto config = targeting("all-linear");
  const auto with = [&](const char* task) {
    return match_targets(config, modules, "bert", task, Strictness::strict).matched;
  };
  CHECK(with("SEQ_CLS") == List{"bert.pooler.dense"});
  CHECK(with("TOKEN_CLS").size() == 2);
}

TEST_CASE("names match whole segments, regular expressions the whole path") {
  CHECK(says(refusal(targeting(List{"proj"})), "selects none"));
  CHECK(refusal(targeting(List{"self_attn.q_proj"})).empty());
  CHECK(says(refusal(targeting("q_proj")), "selects none"));
  CHECK(refusal(targeting(".*q_proj")).empty());
}

TEST_CASE("an entry that matches nothing names what is near and what there is") {
  const auto said = refusal(targeting(List{"q_proj", "down_prj"}));
  CHECK(says(said, "'down_prj' matches none"));
  CHECK(says(said, "nearest name is 'down_proj'"));
  CHECK(says(said, "gate_proj"));
  const auto report =
      match_targets(targeting(List{"q_proj", "down_prj"}), llama(2), "llama", Strictness::lenient);
  CHECK(report.matched.size() == 2);
  CHECK(report.warnings.size() == 1);
}

TEST_CASE("hits are counted for every entry") {
  auto config = targeting(List{"q_proj", "v_proj"});
  config.layers_to_transform = 1;
  config.rank_pattern = {{"q_proj", 2}};
  const auto report = match_targets(config, llama(3), "llama", Strictness::strict);
  REQUIRE(report.hits.size() == 4);
  for (const auto& hits : report.hits)
    CHECK(hits.hits == (hits.option == "layers_to_transform" ? 2 : 1));
}

TEST_CASE("the layer filter spares names that are written out whole") {
  auto config = targeting(List{"q_proj", "model.layers.0.mlp.up_proj"});
  config.layers_to_transform = std::vector<int64_t>{1};
  CHECK(match_targets(config, llama(2), "llama", Strictness::strict).matched ==
        List{"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"});
  config.layers_pattern = List{"h", "layers"};
  CHECK(match_targets(config, llama(2), "llama", Strictness::strict).matched.size() == 2);
}

TEST_CASE("exclusions and whole modules that are saved are no targets") {
  auto config = targeting(List{"q_proj", "v_proj"});
  config.exclude_modules = R"(.*\.0\..*)";
  CHECK(match_targets(config, llama(2), "llama", Strictness::strict).matched.size() == 2);
  config.exclude_modules = List{"self_attn.v_proj"};
  CHECK(says(refusal(config), "'v_proj' stands for 2 modules, but exclude_modules"));
  config.exclude_modules = {};
  config.modules_to_save = List{"layers.1"};
  CHECK(match_targets(config, llama(2), "llama", Strictness::strict).matched.size() == 2);
}

TEST_CASE("what cannot be adapted is refused by name for everybody") {
  for (const auto strictness : {Strictness::strict, Strictness::lenient})
    CHECK(says(refusal(targeting(List{"mlp"}), strictness),
               "'model.layers.0.mlp', which is neither"));
}

TEST_CASE("minimal suffixes hold for the targets alone") {
  CHECK(minimal_suffixes({"a.x.q", "b.x.q"}, {"c.q"}) == List{"x.q"});
  CHECK(minimal_suffixes({"a.q", "b.v"}, {"c.k"}) == List{"q", "v"});
  CHECK(minimal_suffixes({"q"}, {"a.q"}) == List{"q"});
}
