#pragma once

#include <budwood/peft/adapter.h>

#include <functional>
#include <memory>
#include <string>

namespace budwood {

/// What a method must offer so that inject() can attach it. A method adds itself from a static
/// object in its own source file; nothing else in the library names it.
struct Method {
  /// An adapter for the Linear slot at `path`, initialised from `seed`.
  std::function<std::shared_ptr<LinearAdapter>(std::shared_ptr<const AdapterConfig>,
                                               const LinearSlotImpl&, const std::string& path,
                                               uint64_t seed)>
      linear;
};

/// peft_type is HF PEFT's name, for example "LORA".
bool register_method(const std::string& peft_type, Method method);
/// Throws Error with the known names for a type nobody registered.
const Method& method_of(const std::string& peft_type);

}  // namespace budwood
