#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

/// What an adapter remembers of the base it was trained on: some numbers of each weight it changes.
/// Kept as JSON under "budwood.base" in the metadata of its safetensors file (docs/formats.md).
namespace budwood {

/// Numbers that are sampled of one weight.
inline constexpr int64_t kSamples = 16;
inline constexpr const char* kBaseKey = "budwood.base";

struct WeightSample {
  std::string path;  ///< of the module, "model.layers.0.self_attn.q_proj"
  int64_t out = 0, in = 0;
  std::string form;  ///< "float32", "bfloat16", "nf4", "GGUF Q4_1", ...
  bool packed = false;
  std::array<float, kSamples> values{};
};

/// The places (row, column) of W [out, in] that are sampled: they depend on path and size alone.
std::vector<std::pair<int64_t, int64_t>> sampled_places(const std::string& path, int64_t out,
                                                        int64_t in);

struct BaseFingerprint {
  std::vector<WeightSample> weights;

  std::string to_json() const;
  /// Throws Error for what to_json() does not write.
  static BaseFingerprint from_json(const std::string& text);
  /// 16 hexadecimal digits; equal for equal fingerprints.
  std::string digest() const;
};

enum class BaseMatch {
  same,            ///< up to the rounding of 16-bit numbers
  quantised_form,  ///< one is quantised, and the numbers are those of the other within its error
  different,
};

struct BaseComparison {
  BaseMatch match = BaseMatch::same;
  /// Norm of the difference of all sampled numbers, over the norm of those of the adapter.
  double distance = 0;
  std::string trained_form, found_form;  ///< of the first weight
};

/// What was trained on beside what is there; weights of the same path and size are compared.
BaseComparison compare(const BaseFingerprint& trained, const BaseFingerprint& found);

}  // namespace budwood
