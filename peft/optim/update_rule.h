#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

/// Optimisers, from the formula for one tensor up: update_rule.h (how a tensor changes),
/// optimizer.h (many tensors, and what is remembered of them), fused_backward.h (each tensor
/// changes as soon as its gradient is known), block_schedule.h (which of them are trained when)
/// and mezo.h (without gradients).
namespace budwood::optim {

/// What a rule remembers of one tensor, by name. A count of steps is an int64 scalar "step".
using TensorState = std::map<std::string, at::Tensor>;

/// Settings of all rules; each reads what it knows.
struct RuleOptions {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;           ///< galore's is 1e-6 in the paper's code
  double weight_decay = 0.0;   ///< decoupled: times the learning rate
  bool decay_vectors = false;  ///< whether tensors of fewer than two dimensions decay

  int64_t block_size = 256;      ///< adamw8bit: elements with a scale of their own
  int64_t min_8bit_size = 4096;  ///< adamw8bit: tensors of fewer elements keep fp32 moments

  int64_t rank = 128;           ///< galore: of the subspace
  int64_t refresh_every = 200;  ///< galore: updates between two decompositions
  double scale = 0.25;          ///< galore: of the update

  double clip_threshold = 1.0;  ///< adalomo: root mean square of an update, at most
  double least_scale = 1e-3;    ///< adalomo: of the parameters' root mean square, at least

  /// Throws Error with field, value and wanted range.
  void validate() const;
};

/// How one tensor changes, given its gradient.
class UpdateRule {
 public:
  virtual ~UpdateRule() = default;
  /// The rule for this tensor: methods for matrices have another one for the rest. `path` says what
  /// the tensor is, where that is known.
  virtual const UpdateRule& rule_for(const std::string& path, const at::Tensor& p) const {
    return (void)path, (void)p, *this;
  }
  /// What is remembered of a tensor before its first update: names, shapes and dtypes for good.
  virtual TensorState fresh(const at::Tensor& p) const = 0;
  /// One update of p, in place. The gradient is of p's shape and a floating-point dtype; it may be
  /// overwritten. `state` is what fresh() gave, or what the update before left.
  virtual void update(at::Tensor p, at::Tensor grad, TensorState& state, double rate) const = 0;
};

using RuleFactory = std::function<std::unique_ptr<UpdateRule>(const RuleOptions&)>;
/// Adds a rule; called from a static object in its own source file.
bool register_rule(const std::string& name, RuleFactory factory);
/// "adamw", "adamw8bit", "galore", "lomo" (plain gradient descent) or "adalomo". Throws Error for
/// another name and for options that do not hold.
std::shared_ptr<const UpdateRule> make_rule(const std::string& name, const RuleOptions& options);
std::vector<std::string> rule_names();

/// What all rules share: one more step in `state`, and the number of this one, from 1.
int64_t count_step(TensorState& state);
/// p times 1 - rate * weight_decay, where the options say that it decays.
void decay(at::Tensor& p, double rate, const RuleOptions& options);
/// p += scale * change, computed in fp32 (or p's wider dtype) and rounded once to p's.
void add_change(at::Tensor& p, const at::Tensor& change, double scale);

}  // namespace budwood::optim
