#pragma once

#include <budwood/peft/models/model.h>

namespace budwood::models {

/// Makes every parameter of a model trainable: full fine-tuning, in place. Throws Error when the
/// model has adapters, or a weight that is packed (codes and blocks have no gradient).
void train_all(CausalLM& model);

}  // namespace budwood::models
