#include "tiny.h"

#include <budwood/peft/train/checkpoint.h>

#include <fstream>

using namespace budwood;
using namespace budwood::train;
using namespace budwood::train::testing;
namespace fs = std::filesystem;

namespace {

Checkpoint example() {
  Checkpoint c;
  c.state.step = 12;
  c.state.total_steps = 40;
  c.state.position = {1, 5};
  c.state.tokens = 1234;
  c.state.seconds = 0.1 + 0.2;
  c.state.loss_sum = 1.0 / 3.0;
  c.state.loss_tokens = 17;
  c.state.best = {8, 2.0 / 7.0};
  c.state.options = R"({"steps":40})";
  c.state.data_rows = 3;
  c.state.data_tokens = 99;
  c.state.data_checksum = 0xdeadbeef;
  c.state.base = 0xfffffff0;
  c.tensors = {{"parameter.a", at::randn({3, 2})},
               {"step.a", at::scalar_tensor(5, at::kLong)},
               {"rng.cpu", at::randint(0, 255, {77}, at::kByte)}};
  return c;
}

void save(const fs::path& folder) {
  save_checkpoint(folder, example(), [](const fs::path& adapter) {
    fs::create_directory(adapter);
    io::write_file(adapter / "adapter_config.json", "{}");
    io::write_file(adapter / "adapter_model.safetensors", "weights");
  });
}

}  // namespace

TEST_CASE("a checkpoint gives back every number to the bit, and holds the adapter's files") {
  const TemporaryFolder folder;
  at::manual_seed(1);
  const auto saved = example();
  at::manual_seed(1);
  save(folder / "checkpoint-12");
  const auto loaded = load_checkpoint(folder / "checkpoint-12");
  CHECK(loaded.state.step == 12);
  CHECK(loaded.state.total_steps == 40);
  CHECK(loaded.state.position.epoch == 1);
  CHECK(loaded.state.position.batch == 5);
  CHECK(loaded.state.seconds == saved.state.seconds);
  CHECK(loaded.state.loss_sum == saved.state.loss_sum);
  CHECK(loaded.state.best->loss == saved.state.best->loss);
  CHECK(loaded.state.data_checksum == 0xdeadbeef);
  CHECK(loaded.state.base == 0xfffffff0);
  for (const auto& [name, t] : saved.tensors) {
    bool found = false;
    for (const auto& [other, u] : loaded.tensors) found = found || (other == name && u.equal(t));
    CHECK_MESSAGE(found, name);
  }
  CHECK(fs::exists(folder / "checkpoint-12/adapter_config.json"));
  CHECK_FALSE(fs::exists(folder / "checkpoint-12/adapter"));
}

TEST_CASE("a checkpoint with a missing, cut or changed file is refused by name") {
  const TemporaryFolder folder;
  const auto path = folder / "checkpoint-12";
  save(path);
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(path)) files.push_back(entry.path());
  CHECK(files.size() == 4);
  for (const auto& file : files) {
    const auto good = io::read_file(file);
    fs::remove(file);
    CHECK(contains(message_of([&] { load_checkpoint(path); }), path.string()));
    CHECK(contains(message_of([&] { load_checkpoint(path); }), file.filename().string()));
    for (size_t n = 0; n < good.size(); n += std::max<size_t>(1, good.size() / 40)) {
      io::write_file(file, good.substr(0, n));
      CHECK_FALSE(message_of([&] { load_checkpoint(path); }).empty());
    }
    if (file.filename() != "state.json")
      for (size_t at = 0; at < good.size(); at += std::max<size_t>(1, good.size() / 40)) {
        auto bad = good;
        bad[at] = static_cast<char>(bad[at] ^ 1);
        io::write_file(file, bad);
        CHECK(contains(message_of([&] { load_checkpoint(path); }), file.filename().string()));
      }
    io::write_file(file, good);
  }
  CHECK(message_of([&] { load_checkpoint(path); }).empty());
}

TEST_CASE("a state that is of a later version, or reaches outside its folder, is refused") {
  const TemporaryFolder folder;
  const auto path = folder / "checkpoint-12";
  save(path);
  const auto good = io::read_file(path / "state.json");
  const auto with = [&](const std::string& from, const std::string& to) {
    auto bad = good;
    const auto at = bad.find(from);
    REQUIRE(at != std::string::npos);
    io::write_file(path / "state.json", bad.replace(at, from.size(), to));
    return message_of([&] { load_checkpoint(path); });
  };
  CHECK(contains(with("\"version\": 1", "\"version\": 2"), "version 2"));
  CHECK(contains(with("budwood checkpoint", "something"), "not a checkpoint"));
  CHECK(contains(with("\"adapter_config.json\"", "\"../adapter_config.json\""), "not the name"));
  CHECK(contains(with("\"step\": 12", "\"step\": \"x\""), path.string()));
  CHECK(contains(with("\"epoch\": 1,", ""), "epoch"));
}

TEST_CASE("the newest whole checkpoint is found, and what is wrong with newer ones is said") {
  const TemporaryFolder folder;
  const auto output = folder / "run";
  std::vector<std::string> warnings;
  CHECK_FALSE(newest_checkpoint(output, warnings));
  for (const int step : {2, 10, 9}) save(checkpoint_path(output, step));
  fs::create_directory(output / "checkpoint-x");
  const auto listed = list_checkpoints(output);
  REQUIRE(listed.size() == 3);
  CHECK(listed.back().first == 10);
  fs::remove(checkpoint_path(output, 10) / "state.safetensors");
  CHECK(newest_checkpoint(output, warnings));
  REQUIRE(warnings.size() == 1);
  CHECK(contains(warnings[0], "checkpoint-10"));
  prune_checkpoints(output, 1);
  CHECK(list_checkpoints(output).size() == 1);
  prune_checkpoints(output, 0);
  CHECK(list_checkpoints(output).size() == 1);
}

TEST_CASE("the fingerprint of a base sees a changed frozen value and no trained one") {
  const auto model = tiny_model();
  const auto before = base_fingerprint(*model);
  CHECK(before == base_fingerprint(*tiny_model()));
  at::NoGradGuard no_grad;
  for (const auto& [path, p] : trainable_parameters(*model)) p.add_(1);
  CHECK(base_fingerprint(*model) == before);
  model->named_parameters()["head"][0][0] += 1e-3;
  CHECK(base_fingerprint(*model) != before);
}
