#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

/// What is trained at one place of a model. There is one kind of adapter for each kind of slot:
/// linear_adapter.h, embedding_adapter.h, input_adapter.h, attention_adapter.h, block_adapter.h.
namespace budwood {

struct AdapterConfig;

/// Tensors of an adapter under the names its file uses below the module path, for example
/// {"lora_A.weight", A [r, in]}.
using AdapterState = std::vector<std::pair<std::string, at::Tensor>>;

/// The kinds of places; see slot.h.
enum class SlotKind { linear, embedding, input, attention, block };
/// "Linear", "Embedding", "Input", "Attention" or "Block", for a person.
const char* slot_kind_name(SlotKind kind);

/// Its parameters are fp32 leaves; those that require grad when it is made are the ones that are
/// trained while it is active. Training and evaluation mode are those of torch::nn::Module.
class Adapter : public torch::nn::Module {
 public:
  explicit Adapter(std::shared_ptr<const AdapterConfig> config) : config_(std::move(config)) {}

  /// The configuration this adapter was made from; shared by all places of one injection.
  const std::shared_ptr<const AdapterConfig>& config() const { return config_; }
  virtual SlotKind kind() const = 0;

  /// Tensors to save below this place's path, in file order. Writing into them changes the adapter.
  virtual AdapterState state() const = 0;
  /// Tensors that the places of an adapter share, by the key they have in the file. Names that
  /// begin with "budwood." are skipped by other readers, and may be missing in a file.
  virtual AdapterState shared_state() const { return {}; }
  /// What only Budwood needs to go on training, below this place's path; may be missing in a file.
  virtual AdapterState private_state() const { return {}; }
  /// What else changes while it is trained and decides how training goes on: kept in checkpoints
  /// only. Writing into these tensors changes the adapter.
  virtual AdapterState training_state() const { return {}; }
  /// Called after a file was read into the tensors above; `found` are the names that it had of the
  /// private and shared ones. Throws Error when the adapter is of no use without the others.
  virtual void loaded(const std::vector<std::string>& /*found*/) {}

  /// Writes into a configuration that is about to be saved what only the adapter at `path` knows.
  virtual void describe(AdapterConfig& /*saved*/, const std::string& /*path*/) const {}

  /// Parameters that are trained. A tensor that places share is named by the first of them only.
  virtual std::vector<at::Tensor> trained() const;
  /// Those of them that adapters at other places read, too.
  virtual std::vector<at::Tensor> read_elsewhere() const { return {}; }
  /// Which biases of the base are trained along: "none", "all", or "lora_only" (the slot's own).
  virtual std::string trained_bias() const { return "none"; }
  /// Whether a fresh adapter leaves the model's results as they are, bit for bit.
  virtual bool starts_as_identity() const { return true; }
  /// Whether it can take part in forward beside another adapter at the same place.
  virtual bool composes() const { return true; }
  /// Whether it is trained along with a method instead of being one; see companions.h.
  virtual bool companion() const { return false; }
  /// Rank for a report; 0 = has none.
  virtual int64_t rank() const { return 0; }

  /// What the run-time weight of the adapter is; 1 unless set. It multiplies what is added.
  double weight() const { return weight_; }
  void set_weight(double weight) { weight_ = weight; }

 private:
  std::shared_ptr<const AdapterConfig> config_;
  double weight_ = 1.0;
};

}  // namespace budwood
