#include <budwood/peft/io/hf_index.h>
#include <budwood/peft/merge.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../io/temporary_folder.h"

using namespace budwood;
using namespace budwood::io;
using namespace budwood::io::testing;
namespace fs = std::filesystem;

namespace {

using Values = std::vector<float>;

struct Named {
  std::string name;
  std::vector<int64_t> shape;
  Values values;
};

void write_floats(const fs::path& path, const std::vector<Named>& tensors) {
  std::vector<TensorData> data;
  for (const auto& [name, shape, values] : tensors)
    data.push_back({{name, Dtype::f32, shape},
                    {reinterpret_cast<const std::byte*>(values.data()), 4 * values.size()}});
  write_safetensors(path, data);
}

Values read_floats(const fs::path& folder, const std::string& name) {
  const auto files = ModelFiles::open(folder);
  const auto& tensor = files.at(name);
  Values values(tensor.bytes() / 4);
  std::memcpy(values.data(), tensor.data, tensor.bytes());
  return values;
}

const Values kA = {1, 0, -1, 0.5, 0.5, 0}, kB = {1, 2, -1, 0.5};
const std::vector<Named> kFactors = {{"base_model.model.proj.lora_A.weight", {2, 3}, kA},
                                     {"base_model.model.proj.lora_B.weight", {2, 2}, kB}};

// A model of one projection W [2, 3] with a bias, and an adapter of it.
struct Case {
  TemporaryFolder root;

  explicit Case(const std::string& config, const std::vector<Named>& adapter,
                bool transposed = false) {
    fs::create_directory(root / "model");
    fs::create_directory(root / "adapter");
    const std::string path = transposed ? "c_fc" : "proj";
    write_floats(root / "model" / "model.safetensors",
                 {transposed ? Named{path + ".weight", {3, 2}, {1, 4, 2, 5, 3, 6}}
                             : Named{path + ".weight", {2, 3}, {1, 2, 3, 4, 5, 6}},
                  {path + ".bias", {2}, {0.5, -0.5}},
                  {"other.weight", {2}, {7, 8}}});
    spill(root / "model" / "config.json",
          transposed ? "{\"model_type\": \"gpt2\"}" : "{\"model_type\": \"mine\"}");
    auto tensors = adapter;
    for (auto& tensor : tensors)
      if (transposed) tensor.name.replace(tensor.name.find("proj"), 4, path);
    write_floats(root / "adapter" / "adapter_model.safetensors", tensors);
    spill(root / "adapter" / "adapter_config.json",
          "{\"target_modules\": [\"" + path + "\"], " + config + "}");
  }

  MergeFilesReport merge(double weight = 1.0) {
    MergeFilesOptions options;
    options.model = root / "model";
    options.adapters = {{root / "adapter", weight}};
    options.out = root / "out";
    options.overwrite = true;
    return merge_files(options);
  }

  // W as [2, 3], however it is stored.
  Values weight() {
    if (fs::exists(root / "model" / "config.json") &&
        ModelFiles::open(root / "out").find("proj.weight"))
      return read_floats(root / "out", "proj.weight");
    const auto t = read_floats(root / "out", "c_fc.weight");
    return {t[0], t[2], t[4], t[1], t[3], t[5]};
  }
  Values bias() {
    const bool plain = ModelFiles::open(root / "out").find("proj.bias") != nullptr;
    return read_floats(root / "out", plain ? "proj.bias" : "c_fc.bias");
  }
};

void check_near(const Values& found, const Values& wanted) {
  REQUIRE(found.size() == wanted.size());
  for (size_t i = 0; i < found.size(); ++i)
    CHECK(found[i] == doctest::Approx(wanted[i]).epsilon(2e-7));
}

const std::string kLora = "\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 3";

}  // namespace

TEST_CASE("merged weights are HF PEFT's numbers, whichever way the matrix lies") {
  for (const bool transposed : {false, true}) {
    CAPTURE(transposed);
    Case lora(kLora, kFactors, transposed);
    const auto report = lora.merge();
    check_near(lora.weight(), {4, 3.5, 1.5, 2.875, 5.375, 7.5});
    check_near(lora.bias(), {0.5, -0.5});
    CHECK(read_floats(lora.root / "out", "other.weight") == Values{7, 8});
    REQUIRE(report.merged.size() == 1);
    CHECK(report.merged[0].weight_norm == doctest::Approx(std::sqrt(91.0)));
    CHECK(report.merged[0].survival == doctest::Approx(1.0));

    Case rslora(kLora + ", \"use_rslora\": true", kFactors, transposed);
    rslora.merge();
    check_near(rslora.weight(),
               {5.24264050f, 4.12132025f, 0.87867975f, 2.40900993f, 5.53033018f, 8.12132072f});

    auto with_norms = kFactors;
    with_norms.push_back(
        {"base_model.model.proj.lora_magnitude_vector", {2}, {3.74165750f, 8.77496433f}});
    Case dora(kLora + ", \"use_dora\": true", with_norms, transposed);
    dora.merge();
    check_near(dora.weight(),
               {2.71003008f, 2.37127638f, 1.01626134f, 2.61032891f, 4.88018036f, 6.80955362f});

    auto with_bias = kFactors;
    with_bias.push_back({"base_model.model.proj.lora_B.bias", {2}, {10, 20}});
    Case biased(kLora + ", \"lora_bias\": true", with_bias, transposed);
    biased.merge();
    check_near(biased.weight(), {4, 3.5, 1.5, 2.875, 5.375, 7.5});
    check_near(biased.bias(), {15.5, 29.5});

    const std::string ia3 = "\"peft_type\": \"IA3\", \"feedforward_modules\": ";
    Case outputs(ia3 + "[]", {{"base_model.model.proj.ia3_l", {2, 1}, {2, -1}}}, transposed);
    outputs.merge();
    check_near(outputs.weight(), {2, 4, 6, -4, -5, -6});
    check_near(outputs.bias(), {1, 0.5});
    Case inputs(ia3 + (transposed ? "[\"c_fc\"]" : "[\"proj\"]"),
                {{"base_model.model.proj.ia3_l", {1, 3}, {2, -1, 0.5}}}, transposed);
    inputs.merge();
    check_near(inputs.weight(), {2, -2, 1.5, 8, -5, 3});
    check_near(inputs.bias(), {0.5, -0.5});
  }
}

TEST_CASE("a weight of the adapter multiplies its change") {
  Case half(kLora, kFactors);
  half.merge(0.5);
  check_near(half.weight(), {2.5, 2.75, 2.25, 3.4375, 5.1875, 6.75});
  half.merge(0.0);
  check_near(half.weight(), {1, 2, 3, 4, 5, 6});
}

TEST_CASE("verifying finds what another hand has changed") {
  Case lora(kLora, kFactors);
  lora.merge();
  MergeFilesOptions options;
  options.model = lora.root / "model";
  options.adapters = {{lora.root / "adapter", 1.0}};
  options.out = lora.root / "out";
  CHECK(verify_files(options).passed(0.5));
  options.out = lora.root / "model";
  const auto report = verify_files(options);
  CHECK_FALSE(report.passed(1.0));
  CHECK(report.to_json(1.0).find("\"passed\": false") != std::string::npos);
}

TEST_CASE("the model is not touched, and a refused merge leaves nothing") {
  Case wrong(kLora, {kFactors[0]});
  CHECK_THROWS_WITH_AS(wrong.merge(), doctest::Contains("lora_B.weight"), Error);
  CHECK_FALSE(fs::exists(wrong.root / "out"));
  CHECK(read_floats(wrong.root / "model", "proj.weight") == Values{1, 2, 3, 4, 5, 6});
}
