#pragma once

#include <ATen/core/Tensor.h>

#include <budwood/peft/models/batch.h>
#include <budwood/peft/slot.h>
#include <functional>
#include <string>
#include <vector>

/// A model block by block, for what goes through it layer by layer and looks inside (calibrate.h).
namespace budwood::models {

struct Projection {
  std::string path;  ///< in the model
  LinearSlot slot{nullptr};
  /// Its outputs are multiplied with each other before they are used (queries and keys): a change
  /// that is small here need not be small there.
  bool feeds_scores = false;
};

/// Projections that read the same tensor, and who makes it: a factor on its channels can move
/// there. With neither norm nor source there is no such place.
struct InputGroup {
  std::vector<Projection> projections;
  at::Tensor norm = {};        ///< weight [in] of the norm whose output they read
  LinearSlot source{nullptr};  ///< projection whose outputs are the channels, one for one
  /// What comes of their input x [tokens, in] inside the block: the output of the attention or of
  /// the feed-forward part, or of the projection itself.
  std::function<at::Tensor(const at::Tensor& x, const TokenBatch& batch)> output = {};
};

/// True when a factor on the channels of the group's input has a place to go.
bool can_move_scale(const InputGroup& group);

/// Multiplies the columns of the projections by `scale` [in], positive, and divides the channels
/// where their input is made; the model computes what it did. The weights become dense fp32.
/// Returns the scale that was used: what the norm's dtype can hold exactly. Throws Error when the
/// factor has nowhere to go.
at::Tensor move_scale(const InputGroup& group, const at::Tensor& scale);

struct Block {
  std::string path;
  /// x [tokens, hidden] -> [tokens, hidden]; of the last block, the head, logits.
  std::function<at::Tensor(const at::Tensor& x, const TokenBatch& batch)> forward;
  /// In the order in which forward comes to them.
  std::vector<InputGroup> groups;
};

}  // namespace budwood::models
