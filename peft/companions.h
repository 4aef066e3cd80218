#pragma once

#include <budwood/peft/method.h>

#include <string>
#include <vector>

/// What is trained and saved with an adapter at places that its method does not adapt: whole copies
/// of layers (modules_to_save) and single rows of a token table (trainable_token_indices).
namespace budwood {

/// Companions for the places of a model that a configuration asks for. `modules` are the paths of
/// all its modules. Throws Error for a name that matches no module (of a saved configuration that
/// is one more of `warnings`), or one that has no slot.
std::vector<Grafted> make_companions(const std::shared_ptr<const AdapterConfig>& config,
                                     const std::vector<Place>& places,
                                     const std::vector<std::string>& modules, Strictness strictness,
                                     std::vector<std::string>& warnings);

/// A projection with a weight and a bias of its own instead of the base's: fp32 copies [out, in]
/// and [out] of what the base is.
class CopiedLinear final : public LinearAdapter {
 public:
  CopiedLinear(std::shared_ptr<const AdapterConfig> config, const LinearBase& base);

  LinearTerm term(const LinearBase& base) const override;
  AdapterState state() const override;
  bool composes() const override { return false; }
  bool companion() const override { return true; }

 private:
  at::Tensor weight_, bias_;
};

/// A token table of its own instead of the base's, an fp32 copy [vocabulary, dim].
class CopiedEmbedding final : public EmbeddingAdapter {
 public:
  CopiedEmbedding(std::shared_ptr<const AdapterConfig> config, const quant::Weight& table);

  at::Tensor forward(const quant::Weight& table, const at::Tensor& ids,
                     at::Tensor rows) const override;
  at::Tensor fold_rows(const quant::Weight& table, at::Tensor rows, int64_t begin) const override;
  AdapterState state() const override;
  bool composes() const override { return false; }
  bool companion() const override { return true; }

 private:
  at::Tensor weight_;
};

/// Rows of a token table that are trained, [n, dim] in fp32, in place of the base's.
class TrainedTokens final : public EmbeddingAdapter {
 public:
  /// Throws Error for an id outside the table or one that is there twice.
  TrainedTokens(std::shared_ptr<const AdapterConfig> config, const quant::Weight& table,
                const std::vector<int64_t>& ids, const std::string& path);

  at::Tensor forward(const quant::Weight& table, const at::Tensor& ids,
                     at::Tensor rows) const override;
  at::Tensor fold_rows(const quant::Weight& table, at::Tensor rows, int64_t begin) const override;
  AdapterState state() const override;
  bool composes() const override { return false; }
  bool companion() const override { return true; }

  const at::Tensor& ids() const { return ids_; }
  const at::Tensor& rows() const { return rows_; }

 private:
  at::Tensor ids_;    // int64 [n]
  at::Tensor rows_;   // [n, dim]
  at::Tensor index_;  // int64 [vocabulary]: which of rows_, or -1
};

/// The same rows in a head that is tied to the table. Has no tensors of its own.
class TiedTokens final : public LinearAdapter {
 public:
  TiedTokens(std::shared_ptr<const AdapterConfig> config, std::shared_ptr<TrainedTokens> table)
      : LinearAdapter(std::move(config)), table_(std::move(table)) {}

  LinearTerm term(const LinearBase& base) const override;
  AdapterState state() const override { return {}; }
  std::vector<at::Tensor> trained() const override { return {}; }
  bool companion() const override { return true; }

 private:
  std::shared_ptr<TrainedTokens> table_;
};

}  // namespace budwood
