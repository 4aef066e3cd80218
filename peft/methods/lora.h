#pragma once

#include <budwood/peft/embedding_adapter.h>
#include <budwood/peft/linear_adapter.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

namespace budwood {

struct LoraConfig;

/// DoRA's norms, without a second matrix of W's size: of the rows of W + s B A [out], or of the
/// columns of W + s (B A)ᵀ [in]. A [r, in] and B [out, r]; for columns A [r, out] and B [in, r].
class DoraNorms {
 public:
  enum class Along { rows, columns };
  DoraNorms(const quant::Weight& weight, Along along);
  /// With `remember` the result stays, beside a copy of the factors, and is given again while they
  /// have the same values: a token that is generated costs no product of rank r.
  at::Tensor of(const quant::Weight& weight, const at::Tensor& a, const at::Tensor& b,
                double scaling, bool remember = false) const;

 private:
  struct Remembered {
    at::Tensor a, b, norms;
    double scaling;
  };
  at::Tensor computed(const quant::Weight& weight, const at::Tensor& a, const at::Tensor& b,
                      double scaling) const;

  Along along_;
  at::Tensor squares_;  // of W's rows or columns
  const void* weight_;  // whose they are
  mutable std::mutex mutex_;
  mutable std::optional<Remembered> remembered_;
};

/// LoRA on a Linear slot (arXiv 2106.09685): y += s (D(x) Aᵀ) Bᵀ [+ s b_B], D = dropout while
/// training. A [r, in] and B [out, r] are fp32 whatever the base is; s = alpha / r, or
/// alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).
///
/// DoRA (arXiv 2402.09353, use_dora): y = m / n ∘ (x Wᵀ + s (D(x) Aᵀ) Bᵀ) + b, n = the row norms of
/// W + s B A, a constant for gradients, m [out] learned. Dropout acts on the low-rank part alone.
///
/// PiSSA and OLoRA: A and B start as A₀ and B₀, a part of W, and s B₀ A₀ is taken off again in the
/// same formula, so the base keeps its weight, packed or not, and can be had back.
class Lora final : public LinearAdapter {
 public:
  /// Initialises A ~ U(±1/sqrt(in)) (or N(0, 1/r²) for "gaussian") and B = 0, so that the slot
  /// starts as its base.
  Lora(std::shared_ptr<const LoraConfig> config, const LinearBase& base, const std::string& path,
       uint64_t seed);

  LinearTerm term(const LinearBase& base) const override;
  AdapterState state() const override;
  AdapterState private_state() const override;
  void loaded(const std::vector<std::string>& found) override;
  std::string trained_bias() const override;
  bool starts_as_identity() const override;
  bool composes() const override { return !norms_; }

  int64_t rank() const override { return lora_a_.size(0); }
  double scaling() const { return scaling_; }

 private:
  const LoraConfig& own() const;

  double scaling_, dropout_;
  at::Tensor lora_a_, lora_b_;
  at::Tensor bias_;       // of B; undefined without lora_bias
  at::Tensor magnitude_;  // DoRA's m
  std::optional<DoraNorms> norms_;
  at::Tensor start_a_, start_b_;  // A₀, B₀
};

/// LoRA on a token table: row(t) += s B A[:, t]. A [r, vocabulary] starts at 0 and B [dim, r] at
/// N(0, 1). No dropout.
///
/// DoRA: row(t) = m / n ∘ (W[t] + s B A[:, t]), n = the norms of the table's columns with the
/// product added, over the whole vocabulary, m [dim] learned (HF PEFT's convention).
class LoraEmbedding final : public EmbeddingAdapter {
 public:
  LoraEmbedding(std::shared_ptr<const LoraConfig> config, const quant::Weight& table,
                const std::string& path, uint64_t seed);

  at::Tensor forward(const quant::Weight& table, const at::Tensor& ids,
                     at::Tensor rows) const override;
  at::Tensor fold_rows(const quant::Weight& table, at::Tensor rows, int64_t begin) const override;
  AdapterState state() const override;
  bool starts_as_identity() const override;
  bool composes() const override { return !norms_; }
  int64_t rank() const override { return lora_a_.size(0); }

 private:
  at::Tensor gain(const quant::Weight& table) const;

  double scaling_;
  at::Tensor lora_a_, lora_b_;
  at::Tensor magnitude_;  // DoRA's m
  std::optional<DoraNorms> norms_;
};

}  // namespace budwood
