#pragma once

#include <ATen/ATen.h>
#include <budwood/peft/inject.h>
#include <budwood/peft/io/file.h>
#include <budwood/peft/methods/lora_config.h>
#include <budwood/peft/models/model.h>
#include <budwood/peft/slot.h>
#include <budwood/peft/train/crc32.h>
#include <budwood/peft/train/data.h>
#include <budwood/quant/error.h>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "../io/temporary_folder.h"

// Behind torch, whose logging defines CHECK too.
#include <doctest/doctest.h>

/// A language model and data small enough for a test to train many times over.
namespace budwood::train::testing {

constexpr int64_t kVocabulary = 17;
constexpr int64_t kWidth = 8;

/// Rows in memory. mask[r][t] = 1 where the loss counts.
class Rows final : public Dataset {
 public:
  explicit Rows(std::vector<std::vector<uint32_t>> ids, std::vector<std::vector<uint8_t>> mask = {})
      : ids_(std::move(ids)), mask_(std::move(mask)) {
    if (mask_.empty())
      for (const auto& row : ids_) mask_.emplace_back(row.size(), uint8_t{1});
  }
  int64_t rows() const override { return static_cast<int64_t>(ids_.size()); }
  int64_t tokens() const override {
    int64_t n = 0;
    for (const auto& row : ids_) n += static_cast<int64_t>(row.size());
    return n;
  }
  std::span<const uint32_t> ids(int64_t row) const override {
    return ids_.at(static_cast<size_t>(row));
  }
  bool counts(int64_t row, int64_t token) const override {
    return mask_.at(static_cast<size_t>(row)).at(static_cast<size_t>(token)) != 0;
  }
  uint32_t checksum() const override {
    uint32_t crc = 0;
    for (const auto& row : ids_) crc = crc32(row.data(), 4 * row.size(), crc);
    return crc;
  }

 private:
  std::vector<std::vector<uint32_t>> ids_;
  std::vector<std::vector<uint8_t>> mask_;
};

/// Rows of random length and content; about a third of the tokens do not count.
inline std::shared_ptr<Rows> random_rows(int rows, int longest, unsigned seed = 1) {
  std::mt19937 random(seed);
  std::vector<std::vector<uint32_t>> ids;
  std::vector<std::vector<uint8_t>> mask;
  for (int r = 0; r < rows; ++r) {
    const auto n = 2 + random() % static_cast<unsigned>(longest - 1);
    ids.emplace_back();
    mask.emplace_back();
    for (unsigned t = 0; t < n; ++t) {
      ids.back().push_back(random() % kVocabulary);
      mask.back().push_back(random() % 3 != 0);
    }
  }
  return std::make_shared<Rows>(std::move(ids), std::move(mask));
}

/// hidden[t] = tanh(proj(mean of the embeddings of tokens 0..t of its sequence + position code)):
/// what a token sees depends on the borders of its sequence and on its position, as in a decoder.
class TinyLM final : public models::CausalLM {
 public:
  TinyLM() : CausalLM(config()) {
    auto generator = at::detail::createCPUGenerator(3);
    const auto draw = [&](int64_t out, int64_t in) { return at::randn({out, in}, generator); };
    embedding_ = register_parameter("embedding", draw(kVocabulary, kWidth), false);
    place_ = register_parameter("place", draw(512, kWidth) * 0.3, false);
    head_ = register_parameter("head", draw(kVocabulary, kWidth) * 0.5, false);
    proj_ = register_module("proj", LinearSlot(quant::Weight::dense(draw(kWidth, kWidth) * 0.3)));
    out_ = register_module("out", LinearSlot(quant::Weight::dense(draw(kWidth, kWidth) * 0.3)));
  }

  at::Tensor hidden(const models::TokenBatch& batch, models::KvCache*) override {
    const auto x = embedding_.index_select(0, batch.ids);
    std::vector<at::Tensor> means;
    for (size_t s = 0; s + 1 < batch.cu_seqlens.size(); ++s) {
      const auto part = x.slice(0, batch.cu_seqlens[s], batch.cu_seqlens[s + 1]);
      means.push_back(part.cumsum(0) / at::arange(1, part.size(0) + 1, at::kFloat).unsqueeze(1));
    }
    const auto h = at::cat(means) + x + place_.index_select(0, batch.positions);
    return out_(at::tanh(proj_(h)));
  }
  at::Tensor logits(const at::Tensor& hidden) override { return at::linear(hidden, head_); }
  std::vector<at::Tensor> head_parameters() const override { return {}; }
  at::ScalarType dtype() const override { return at::kFloat; }

 private:
  static models::ModelConfig config() {
    models::ModelConfig c;
    c.model_type = "tiny";
    c.vocab_size = kVocabulary;
    c.hidden_size = kWidth;
    c.max_position_embeddings = 512;
    return c;
  }
  at::Tensor embedding_, place_, head_;
  LinearSlot proj_{nullptr}, out_{nullptr};
};

/// A fresh model with LoRA on both projections; every call gives the same one.
inline std::shared_ptr<TinyLM> tiny_model(double dropout = 0.0) {
  auto model = std::make_shared<TinyLM>();
  auto config = std::make_shared<LoraConfig>();
  config->r = 3;
  config->lora_alpha = 6;
  config->lora_dropout = dropout;
  config->target_modules = std::vector<std::string>{"proj", "out"};
  inject(*model, config, "default", 5);
  return model;
}

/// All trained values, one after the other.
inline at::Tensor trained(torch::nn::Module& model) {
  std::vector<at::Tensor> flat;
  for (const auto& [path, p] : trainable_parameters(model))
    flat.push_back(p.detach().flatten().clone());
  return at::cat(flat);
}

using io::testing::TemporaryFolder;

/// The message of the Error that `body` throws; empty when it throws none.
template <class F>
std::string message_of(F&& body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace budwood::train::testing
