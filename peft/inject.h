#pragma once

#include <torch/nn/module.h>

#include <budwood/peft/config.h>
#include <budwood/peft/slot.h>
#include <memory>
#include <string>
#include <vector>

namespace budwood {

/// One adapted place.
struct Injected {
  std::string path;
  std::string kind;         ///< of slot: "Linear", ...
  int64_t out = 0, in = 0;  ///< of a projection or a table
  int64_t rank = 0;
  int64_t parameters = 0;  ///< trainable numbers added here
};

/// What an injection did.
struct InjectReport {
  std::vector<Injected> places;
  std::vector<std::string> warnings;
  int64_t trainable = 0;  ///< trainable parameters of the whole model afterwards
  int64_t total = 0;      ///< all parameters of the model, adapters included

  /// A table for a person: one line for each group of equal places, then the totals.
  std::string summary() const;
};

/// Attaches adapters to the slots of a model and freezes everything else.
///
/// Which slots: the rules of HF PEFT (list of names, regex, "all-linear", exclusions, layers); a
/// pattern that matches nothing is an Error. `seed` makes the initial factors reproducible: each
/// place draws from its own stream, so its values do not depend on which other places are adapted.
InjectReport inject(torch::nn::Module& model, std::shared_ptr<const AdapterConfig> config,
                    const std::string& name = "default", uint64_t seed = 0);

/// Removes an adapter from all slots. Throws when no slot has it.
void detach(torch::nn::Module& model, const std::string& name);

/// Makes exactly these adapters take part in forward, and only them trainable.
void set_active(torch::nn::Module& model, const std::vector<std::string>& names,
                Composition composition = Composition::stack);

/// From now on multiplies what an adapter changes at every place (1 = as trained), without touching
/// its parameters; files do not keep it. Whole modules and token rows that are trained along have
/// no half. Throws for a name that no slot has, for a merged adapter and for a weight that is not
/// finite.
void set_weight(torch::nn::Module& model, const std::string& name, double weight);

/// Folds the adapters into the base weights; see LinearSlotImpl::merge. All slots or none.
void merge(torch::nn::Module& model, const std::vector<std::string>& names = {"default"});
/// Restores the base weights bit for bit.
void unmerge(torch::nn::Module& model);

/// Switches all adapters off for the length of a scope.
class DisableAdapters {
 public:
  explicit DisableAdapters(torch::nn::Module& model);
  ~DisableAdapters();
  DisableAdapters(const DisableAdapters&) = delete;
  DisableAdapters& operator=(const DisableAdapters&) = delete;

 private:
  torch::nn::Module& model_;
};

/// Switches all adapters of a model off or on again; see DisableAdapters for a scope.
void set_adapters_enabled(torch::nn::Module& model, bool enabled);

/// The sum of the terms that active adapters add to the loss (AdaLoRA's); undefined when none does.
at::Tensor penalty(torch::nn::Module& model);
/// To be called before the forward and after the update of optimiser step `step`, counted from 0:
/// for methods whose adapters change during training (AdaLoRA, DyLoRA). Trainer does.
void before_step(torch::nn::Module& model, int64_t step);
void after_step(torch::nn::Module& model, int64_t step);

/// Trainable parameters by path, in a fixed order, each once; what an optimiser takes.
std::vector<std::pair<std::string, at::Tensor>> trainable_parameters(torch::nn::Module& model);

/// The tensors of an adapter by the key they have in its file, and its configuration as it is
/// saved. Writing into a tensor that is a parameter changes the adapter.
std::vector<std::pair<std::string, at::Tensor>> adapter_tensors(torch::nn::Module& model,
                                                                const std::string& name);
std::shared_ptr<AdapterConfig> adapter_config(torch::nn::Module& model, const std::string& name);
/// Copies tensors by those keys into an attached adapter. Missing, unknown and wrongly shaped ones
/// are one Error that lists them all; then nothing was copied. `source` stands for them in errors.
void set_adapter_tensors(torch::nn::Module& model,
                         const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                         const std::string& source, const std::string& name = "default");

/// Adapter as a folder in HF PEFT's layout (adapter_config.json, adapter_model.safetensors). The
/// folder appears whole or not at all. Loads in HF PEFT.
void save_adapter(torch::nn::Module& model, const std::string& folder,
                  const std::string& name = "default");
/// Injects what such a folder holds. Missing, unknown and wrongly shaped tensors are one Error that
/// lists them all.
InjectReport load_adapter(torch::nn::Module& model, const std::string& folder,
                          const std::string& name = "default");

}  // namespace budwood
