#pragma once

#include <budwood/peft/merge/fold_term.h>
#include <budwood/peft/merge/merge_base.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace budwood {

/// One module of a LoRA adapter: its weight is changed by scaling · B A.
struct LoraModule {
  std::string path;  ///< "model.layers.0.self_attn.q_proj"
  FloatArray a;      ///< [r, in]; of a token table [r, vocabulary]
  FloatArray b;      ///< [out, r]; of a token table [dim, r]
  double scaling = 1.0;
  FloatArray magnitude;  ///< DoRA's [out]
  bool table = false;

  int64_t rank() const { return a.shape[0]; }
};

/// An adapter without its format.
struct LoraSet {
  std::vector<LoraModule> modules;
  std::optional<std::string> base_model, task_type;
  std::vector<std::string> warnings;
};

int64_t largest_rank(const std::vector<LoraModule>& modules);
bool any_magnitude(const std::vector<LoraModule>& modules);
/// The scaling that all modules share.
std::optional<double> common_scaling(const std::vector<LoraModule>& modules);

/// B times a factor, rounded once.
FloatArray scaled(const FloatArray& b, double factor);
/// A [r, in] with rows of zeros, B [out, r] with columns of zeros, up to a rank.
FloatArray padded_a(const FloatArray& a, int64_t rank);
FloatArray padded_b(const FloatArray& b, int64_t rank);
FloatArray transposed(const FloatArray& matrix);

/// The base model as far as formats want to know it.
class ConvertBase {
 public:
  /// `path` empty: nothing is known, and every question is an Error that asks for the model.
  ConvertBase(const std::filesystem::path& path, std::string wanted_for);
  bool known() const { return base_ != nullptr; }
  const MergeBase& files() const;
  std::string model_type() const;
  /// GGUF's name of the architecture.
  std::string architecture() const;
  int64_t head_dim() const;
  int64_t integer(const std::string& key) const;
  std::string text(const std::string& key, const std::string& usual) const;
  /// Throws for modules whose weight is missing or of another shape.
  void check(const LoraSet& set) const;

 private:
  std::unique_ptr<MergeBase> base_;
  std::string wanted_for_;
};

/// A library's files.
struct LoraFormat {
  std::function<bool(const std::filesystem::path& path)> is;
  std::function<LoraSet(const std::filesystem::path& path, const ConvertBase& base)> read;
  std::function<void(const std::filesystem::path& out, LoraSet& set, const ConvertBase& base)>
      write;
  bool single_file = false;
  bool needs_model = false;  ///< to be written
};

/// Adds a format; called from a static object in its own source file.
bool register_lora_format(const std::string& name, LoraFormat format);
const LoraFormat& lora_format(const std::string& name);
/// The format of what lies at a path; nothing when it is none of them.
std::optional<std::string> find_lora_format(const std::filesystem::path& path);
/// The same; throws, naming what was looked for.
std::string lora_format_of(const std::filesystem::path& path);

}  // namespace budwood
