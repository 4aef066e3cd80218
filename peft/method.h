#pragma once

#include <budwood/peft/config.h>
#include <budwood/peft/slot.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

/// What a method is: adapters for places. A method adds itself from a static object in its own
/// source file; nothing else in the library names it.
namespace budwood {

/// A place where an adapter can attach, as a method sees it. What a kind of place does not have is
/// left as it is here.
struct Place {
  std::string path;
  SlotKind kind = SlotKind::linear;
  uint64_t seed = 0;                              ///< of the place's own stream of random numbers
  int64_t layer = -1;                             ///< attention, block
  LinearBase base = {};                           ///< linear; of an embedding the table
  int64_t hidden = 0;                             ///< input, attention, block
  int64_t heads = 0, kv_heads = 0, head_dim = 0;  ///< attention
  std::string part = {};                          ///< block: "attention" or "feed_forward"
};

/// An adapter and the number of the place it is for.
struct Grafted {
  size_t place = 0;
  std::shared_ptr<Adapter> adapter;
};

using Adapters = std::vector<std::shared_ptr<Adapter>>;

struct Method {
  /// Adapters for `places`: the targets of a method whose configuration has target rules, else all
  /// places of the model, in its order. `seed` is for what the places share. Throws Error for a
  /// place the method cannot attach to.
  std::function<std::vector<Grafted>(std::shared_ptr<const AdapterConfig>,
                                     const std::vector<Place>& places, uint64_t seed)>
      make;
  /// A term of the loss, from all adapters of one injection; empty = none.
  std::function<at::Tensor(const Adapters&)> penalty = {};
  /// Called before the forward and after the update of optimiser step `step`, counted from 0.
  std::function<void(const Adapters&, int64_t step)> before_step = {};
  std::function<void(const Adapters&, int64_t step)> after_step = {};
};

/// peft_type is HF PEFT's name, for example "LORA".
bool register_method(const std::string& peft_type, Method method);
/// Throws Error with the known names for a type nobody registered.
const Method& method_of(const std::string& peft_type);

/// `config` as a method's own; throws Error when it is another's.
template <class Config>
std::shared_ptr<const Config> own_config(const std::shared_ptr<const AdapterConfig>& config);
/// Throws Error unless the place is one of `kind`: "peft_type attaches to Linear slots, ...".
void require_kind(const Place& place, SlotKind kind, const std::string& peft_type);

/// A place's or a shared stream of random numbers.
at::Generator stream(uint64_t seed);

// ---

[[noreturn]] void refuse_config(const std::string& peft_type);

template <class Config>
std::shared_ptr<const Config> own_config(const std::shared_ptr<const AdapterConfig>& config) {
  auto own = std::dynamic_pointer_cast<const Config>(config);
  if (!own) refuse_config(config->peft_type);
  return own;
}

}  // namespace budwood
