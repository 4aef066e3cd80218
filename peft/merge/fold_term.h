#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

/// What an adapter's file says about one weight, without torch. LinearTerm (linear_adapter.h) is
/// the same formula over tensors.
namespace budwood {

struct AdapterConfig;

/// A small array in memory, widened to fp32.
struct FloatArray {
  std::vector<int64_t> shape;
  std::vector<float> values;
  bool defined() const { return !shape.empty(); }
  int64_t size() const { return static_cast<int64_t>(values.size()); }
};

/// W' = g ∘ (W ∘ input_gain + s B A), g = gain, or magnitude over the row norms of the bracket;
/// b' = b + s inner_bias, times gain. For a token table W [vocabulary, dim] read Wᵀ.
struct FoldTerm {
  FloatArray a;            ///< [r, in]
  bool leading_a = false;  ///< A may be wider: its leading columns count
  FloatArray b;            ///< [out, r]
  double scaling = 1.0;
  FloatArray inner_bias;  ///< [out]
  FloatArray gain;        ///< [out]
  FloatArray magnitude;   ///< [out]
  FloatArray input_gain;  ///< [in]
  FloatArray scales;      ///< [out, groups]: of a group-affine W, in place of its own
  FloatArray zeros;       ///< likewise its zero points
  int64_t group = 0;      ///< A is the same in all columns of such a group; 0 = no groups
};

/// The tensors of one module of an adapter file.
class ModuleTensors {
 public:
  virtual ~ModuleTensors() = default;
  virtual const std::string& path() const = 0;
  /// Undefined when the file has no such tensor. Suffixes follow the module's path.
  virtual FloatArray find(const std::string& suffix) const = 0;
  /// Throws when there is none, or when it has not the number of dimensions.
  virtual FloatArray at(const std::string& suffix, size_t dimensions) const = 0;
  /// By the whole key.
  virtual FloatArray shared(const std::string& key) const = 0;
};

/// How a method's files are folded.
struct FoldMethod {
  /// Ends of keys that belong to a module.
  std::vector<std::string> suffixes;
  /// Those of them that are there when a module holds a token table.
  std::vector<std::string> table_suffixes;
  std::function<FoldTerm(const AdapterConfig& config, const ModuleTensors& tensors)> term;
  /// Why an adapter of this configuration needs the model itself; nothing = it does not.
  std::function<std::optional<std::string>(const AdapterConfig& config)> needs_model;
};

/// Adds a method; called from a static object in its own source file.
bool register_fold(const std::string& peft_type, FoldMethod method);
/// Null for a method that is no change of weights.
const FoldMethod* find_fold(const std::string& peft_type);

}  // namespace budwood
