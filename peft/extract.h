#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

/// From two models to an adapter: the difference of their weights as LoRA factors, by truncated
/// singular value decomposition.
namespace budwood {

struct ExtractOptions {
  std::filesystem::path base;   ///< a Hugging Face folder of plain weights
  std::filesystem::path tuned;  ///< one of the same architecture
  std::filesystem::path out;    ///< the adapter folder that is written
  int64_t rank = 0;             ///< of every module; or
  double energy = 0.0;          ///< the least part of each ||D||² that is kept, in (0, 1]
  /// Ends of module paths; empty = every projection but the head. Tables are never meant.
  std::vector<std::string> targets;
  bool overwrite = false;
};

struct ExtractedModule {
  std::string path;
  int64_t rank = 0;
  double delta_norm = 0;  ///< ||D||, D = tuned - base in fp64
  double energy = 0;      ///< the part of ||D||² that the factors hold
};

/// Where the models differ and the adapter says nothing.
struct LostTensor {
  std::string name;
  double delta_norm = 0;  ///< NaN when the shapes differ
};

struct ExtractReport {
  std::vector<ExtractedModule> modules;
  std::vector<std::string> identical;  ///< targets that do not differ: not part of the adapter
  std::vector<LostTensor> lost;        ///< norms, biases, tables, heads and other targets
  int64_t parameters = 0;
};

/// Writes B = U √S [out, r] and A = √S Vᵀ [r, in] of each D = U S Vᵀ, fp32, scaling 1, in HF PEFT's
/// layout. One pair of weights is in memory at a time. Merging the adapter of a merged model gives
/// that model again to rounding, when the rank is not below the adapter's; where the weights are
/// 16-bit, D holds their rounding, which no small rank has.
///
/// Throws Error for models that differ in their tensors' names, for targets that match nothing, and
/// when nothing differs.
ExtractReport extract(const ExtractOptions& options);

}  // namespace budwood
