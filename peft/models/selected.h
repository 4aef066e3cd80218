#pragma once

#include <budwood/peft/models/model.h>
#include <cstdint>
#include <vector>

namespace budwood::models {

/// Back-propagation through some tokens alone (TokenTune, arXiv 2501.18824): the values are those
/// of the whole batch, but hidden states, keys and values of the tokens that are not chosen are
/// constants, of which nothing but keys and values is kept. With all tokens chosen it is the
/// ordinary loss with its gradient.
///
/// rows: the chosen tokens' numbers in the batch, rising, at least one of each sequence. labels
/// int64 [tokens] are those of the whole batch; the loss is over the chosen rows. The model may
/// have adapters on projections and tables; those of attention, blocks and inputs are refused with
/// an Error, and so are rows that do not fit.
LossSum selected_loss(CausalLM& model, const TokenBatch& batch, const at::Tensor& labels,
                      const std::vector<int64_t>& rows);

/// Which tokens to choose: the first and the last of each sequence, and others uniformly without
/// replacement, among those that count in the loss first. `amount` of 1 or more is so many of each
/// sequence, below 1 that part of it, rounded up. A function of its arguments. Throws Error for a
/// sequence with fewer tokens than are to be chosen.
std::vector<int64_t> select_tokens(const TokenBatch& batch, const at::Tensor& labels, double amount,
                                   uint64_t seed, int64_t step, int64_t part);

}  // namespace budwood::models
