#pragma once

#include <budwood/peft/inject.h>

namespace budwood {

/// inject() for a configuration of known origin: lenient for one read from a saved folder.
InjectReport inject_matched(torch::nn::Module& model, std::shared_ptr<const AdapterConfig> config,
                            const std::string& name, uint64_t seed, Strictness strictness);

}  // namespace budwood
