#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include "temporary_folder.h"

using namespace budwood;
using namespace budwood::io;
using namespace budwood::io::testing;
namespace fs = std::filesystem;

namespace {

const std::string kHash(40, 'a');

// Writes a file of U8 tensors, each of one byte.
void write_bytes(const fs::path& path, const std::vector<std::string>& names) {
  const std::byte byte{1};
  std::vector<TensorData> tensors;
  for (const auto& name : names) tensors.push_back({{name, Dtype::u8, {1}}, {&byte, 1}});
  write_safetensors(path, tensors);
}

void write_index(const fs::path& folder, const std::string& map) {
  spill(folder / "model.safetensors.index.json", "{\"weight_map\":{" + map + "}}");
}

std::string refusal(const fs::path& path) {
  return message_of<Error>([&] { ModelFiles::open(path); });
}

}  // namespace

TEST_CASE("a folder with one file and the file itself are the same model") {
  TemporaryFolder folder;
  write_bytes(folder / "model.safetensors", {"b", "a"});
  for (const auto& path : {folder.path(), folder / "model.safetensors"}) {
    const auto model = ModelFiles::open(path);
    REQUIRE(model.tensors().size() == 2);
    CHECK(model.tensors()[0]->name == "a");
    CHECK(model.at("b").bytes() == 1);
    CHECK(model.find("c") == nullptr);
  }
  CHECK(contains(message_of<Error>([&] { ModelFiles::open(folder.path()).at("c"); }),
                 "has no tensor 'c'"));
}

TEST_CASE("shards are one model, also after it has been moved") {
  TemporaryFolder folder;
  write_bytes(folder / "model-00001-of-00002.safetensors", {"z", "b"});
  write_bytes(folder / "model-00002-of-00002.safetensors", {"a"});
  write_index(folder.path(),
              R"("a":"model-00002-of-00002.safetensors","b":"model-00001-of-00002.safetensors",)"
              R"("z":"model-00001-of-00002.safetensors")");
  auto opened = ModelFiles::open(folder.path());
  const auto model = std::move(opened);
  REQUIRE(model.tensors().size() == 3);
  CHECK(model.tensors()[0]->name == "b");
  CHECK(model.tensors()[1]->name == "z");
  CHECK(model.tensors()[2]->name == "a");
  CHECK(model.at("a").file->path().filename() == "model-00002-of-00002.safetensors");
}

TEST_CASE("index and files that disagree are refused, naming tensor and file") {
  TemporaryFolder folder;
  write_bytes(folder / "x.safetensors", {"a", "b"});
  write_bytes(folder / "y.safetensors", {"c"});
  const auto with = [&](const std::string& map) {
    write_index(folder.path(), map);
    return refusal(folder.path());
  };
  const std::string ab = R"("a":"x.safetensors","b":"x.safetensors")";
  CHECK(with(ab).empty());
  CHECK(contains(with(ab + R"(,"c":"z.safetensors")"), "'z.safetensors' does not exist"));
  CHECK(contains(with(R"("a":"x.safetensors")"), "holds the tensor 'b', which"));
  CHECK(contains(with(ab + R"(,"d":"x.safetensors")"), "lacks the tensor 'd'"));
  CHECK(contains(with(R"("a":"x.safetensors","b":"y.safetensors","c":"y.safetensors")"),
                 "holds the tensor 'b', which model.safetensors.index.json places in 'y."));
  CHECK(contains(with(R"("a":"../x.safetensors")"), "not a plain file name"));
  CHECK(contains(with(R"("a":"/etc/x.safetensors")"), "not a plain file name"));
  CHECK(contains(with(R"("a":"..")"), "not a plain file name"));
  CHECK(contains(with(R"("a":"sub\\x.safetensors")"), "not a plain file name"));
  CHECK(contains(with(R"("a":"")"), "not a plain file name"));
  CHECK(contains(with(R"("a":"x.bin")"), "not a .safetensors file"));
  CHECK(contains(with(R"("a":1)"), "is number, a string is needed"));
  CHECK(contains(with(R"("a":"x.safetensors","a":"y.safetensors")"), "stands twice"));
  CHECK(contains(with(""), "is empty"));
  spill(folder / "model.safetensors.index.json", "[]");
  CHECK(contains(refusal(folder.path()), "no object \"weight_map\""));
  spill(folder / "model.safetensors.index.json", "{");
  CHECK(contains(refusal(folder.path()), "not valid JSON"));
}

TEST_CASE("a folder without weights, or with two kinds of them, is refused") {
  TemporaryFolder folder;
  CHECK(contains(refusal(folder.path()), "holds neither model.safetensors nor"));
  CHECK(contains(refusal(folder / "none"), "No such file"));
  write_bytes(folder / "model.safetensors", {"a"});
  write_bytes(folder / "x.safetensors", {"a"});
  write_index(folder.path(), R"("a":"x.safetensors")");
  CHECK(contains(refusal(folder.path()), "holds both"));
  fs::remove(folder / "x.safetensors");
  write_index(folder.path(), R"("a":"model.safetensors")");
  CHECK(refusal(folder.path()).empty());
}

TEST_CASE("links may stay in the folder or be the hub cache's, nothing else") {
  TemporaryFolder root;
  const fs::path hub = root / "models--x", snapshot = hub / "snapshots/main";
  fs::create_directories(hub / "blobs");
  fs::create_directories(snapshot / "sub");
  write_bytes(hub / "blobs" / kHash, {"a"});
  write_bytes(root / kHash, {"a"});
  const auto link = [&](const fs::path& target, const fs::path& folder) {
    fs::remove(folder / "model.safetensors");
    fs::create_symlink(target, folder / "model.safetensors");
    return refusal(folder);
  };
  CHECK(link("../../blobs/" + kHash, snapshot).empty());
  CHECK(link("../../../blobs/" + kHash, snapshot / "sub").empty());
  CHECK(contains(link(hub / "blobs" / kHash, snapshot), "outside the folder"));
  CHECK(contains(link("../../../" + kHash, snapshot), "outside the folder"));
  CHECK(contains(link("../../blobs/" + std::string(40, 'b'), snapshot), "does not exist"));
  fs::rename(hub / "blobs" / kHash, hub / "blobs/short");
  CHECK(contains(link("../../blobs/short", snapshot), "outside the folder"));
  // A blob that is itself a link could lead anywhere.
  fs::create_symlink(root / kHash, hub / "blobs" / kHash);
  CHECK(contains(link("../../blobs/" + kHash, snapshot), "outside the folder"));
  // The same layout without the cache's folder names.
  fs::create_directories(root / "other/deep");
  fs::create_directories(root / "blobs");
  write_bytes(root / "blobs" / kHash, {"a"});
  CHECK(contains(link("../../blobs/" + kHash, root / "other/deep"), "outside the folder"));
  write_bytes(snapshot / "weights.safetensors", {"a"});
  CHECK(link("weights.safetensors", snapshot).empty());
  CHECK(contains(message_of<Error>([&] { file_in_folder(snapshot, "../main"); }),
                 "not a plain file name"));
}

TEST_CASE("shards are planned as transformers plans them") {
  const auto plan = [](const std::vector<int64_t>& sizes, uint64_t max_bytes) {
    std::vector<TensorSpec> specs;
    for (const auto size : sizes)
      specs.push_back({"t" + std::to_string(specs.size()), Dtype::u8, {size}});
    std::vector<std::vector<std::string>> names;
    for (const auto& shard : plan_shards(specs, max_bytes)) {
      names.emplace_back();
      for (const auto& tensor : shard) names.back().push_back(tensor.name);
    }
    return names;
  };
  using Names = std::vector<std::vector<std::string>>;
  CHECK(plan({4, 4, 4}, 8) == Names{{"t0", "t1"}, {"t2"}});
  CHECK(plan({4, 20, 4, 4}, 8) == Names{{"t1"}, {"t0", "t2"}, {"t3"}});
  CHECK(plan({4, 4}, 8) == Names{{"t0", "t1"}});
  CHECK(plan({}, 8) == Names{{}});
  CHECK(contains(message_of<Error>([&] { plan({1}, 0); }), "0 bytes"));
}

TEST_CASE("a model written in shards is read back, with totals in its index") {
  TemporaryFolder folder;
  const std::vector<TensorSpec> specs = {{"a", Dtype::f32, {4}},  {"e", Dtype::f32, {0}},
                                         {"b", Dtype::u8, {3}},   {"c", Dtype::f32, {2, 2}},
                                         {"d", Dtype::bf16, {5}}, {"big", Dtype::u8, {100}}};
  ShardedWriter writer(folder.path(), specs, 20);
  for (const auto& spec : writer.order()) {
    const std::string data(spec.bytes(), spec.name[0]);
    writer.write(spec.name, data.data(), data.size() / 2);
    writer.write(spec.name, data.data(), data.size() - data.size() / 2);
  }
  writer.commit();
  const auto model = ModelFiles::open(folder.path());
  REQUIRE(model.tensors().size() == specs.size());
  for (const auto& spec : specs) {
    const auto& tensor = model.at(spec.name);
    CHECK(tensor.dtype == spec.dtype);
    CHECK(tensor.shape == spec.shape);
    for (uint64_t i = 0; i < tensor.bytes(); ++i)
      CHECK(std::to_integer<char>(tensor.data[i]) == spec.name[0]);
  }
  CHECK(model.files().size() == 4);
  CHECK(model.files()[0].path().filename() == "model-00001-of-00004.safetensors");
  CHECK(model.files()[0].metadata() == Metadata{{"format", "pt"}});
  const auto text = slurp(folder / "model.safetensors.index.json");
  const auto index = parse_json(text, "index");
  CHECK(index["metadata"]["total_parameters"] == 116);
  CHECK(index["metadata"]["total_size"] == 145);
  CHECK(text.starts_with("{\n  \"metadata\": {\n    \"total_parameters\": 116,"));
}

TEST_CASE("a small model is one file without an index, and missing data is an error") {
  TemporaryFolder folder;
  ShardedWriter writer(folder.path(), {{"a", Dtype::u8, {4}}});
  CHECK(contains(message_of<Error>([&] { writer.commit(); }), "'a' still lacks 4 of 4 bytes"));
  writer.write("a", "abcd", 4);
  writer.commit();
  CHECK(entries(folder.path()) == 1);
  CHECK(ModelFiles::open(folder.path()).at("a").bytes() == 4);
  ShardedWriter two(folder.path(), {{"a", Dtype::u8, {4}}, {"b", Dtype::u8, {4}}}, 4);
  CHECK(contains(message_of<Error>([&] { two.commit(); }), "shard 1 of 2 is not complete"));
  CHECK(contains(
      message_of<Error>([&] {
        ShardedWriter same(folder.path(), {{"a", Dtype::u8, {4}}, {"a", Dtype::i8, {4}}}, 4);
      }),
      "two tensors are called 'a'"));
}
