#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

/// Frozen weights: what a base model looks like when it is used, not trained.
///
/// Conventions of the whole library: a linear weight W is [out, in], row-major, and y = x Wᵀ + b.
/// x is [..., in]. Results have the dtype of x; a weight stored in another dtype is converted panel
/// by panel, never as a whole.
namespace budwood::quant {

/// How the parts of a weight are to be read. The numbers are part of the operators' schema.
enum class Format : int64_t {
  dense = 0,             ///< parts = {W [out, in]}, fp32, bf16, fp16 or fp64
  dense_transposed = 1,  ///< parts = {Wᵀ [in, out]}, the storage of transformers' Conv1D

  // Sizes, int64 [1], may stay on the CPU when the other parts are on a device.

  /// LLM.int8: parts = {codes int8 [out, in], largest magnitude of each row fp32 [out]}.
  int8_rows = 2,
  /// bitsandbytes' 4 bits (kernels/bnb4.h). parts = {codes uint8, (out * in + 1) / 2 bytes of any
  /// shape, absmax fp32 [blocks], block size int64 [1]}; with doubly quantised scales {codes,
  /// absmax codes uint8 [blocks], block size, nested absmax fp32 [ceil(blocks / 256)], map fp32
  /// [256], offset fp32 [1]}.
  nf4 = 3,
  fp4 = 4,
  /// Group-affine integers (kernels/affine.h): parts = {codes uint8 [out, bytes of a row], scales
  /// fp32 [out, groups], zeros fp32 or uint8 [out, groups], group size int64 [1]}. A fifth part,
  /// int32 [in], is there when groups are not made of neighbours (GPTQ's act-order): the column of
  /// W that each stored column is.
  affine4 = 5,
  affine8 = 6,

  /// Blocks of GGUF files (kernels/gguf_blocks.h): 16 + the file format's own type number.
  /// parts = {uint8 [out, bytes of a row]}.
  gguf_q4_0 = 18,
  gguf_q4_1 = 19,
  gguf_q5_0 = 22,
  gguf_q5_1 = 23,
  gguf_q8_0 = 24,
  gguf_q4_k = 28,
  gguf_q5_k = 29,
  gguf_q6_k = 30,
};

/// What is done to a product in the same pass. `gain` [out] multiplies W's rows before anything is
/// added. Added are bias [columns] to every row; scale * left * right with left [rows, r] and right
/// [r, columns]; and `onto`, of the result's size and dtype, whose memory the result may take.
struct Terms {
  at::Tensor gain = {};
  std::optional<at::Tensor> bias = {};
  at::Tensor left = {}, right = {};
  double scale = 1.0;
  at::Tensor onto = {};
};

/// Adds them to y [rows, columns] in a pass of their own, in the dtype of left.
void add_terms(at::Tensor& y, const Terms& terms);
/// y [..., columns] with the terms added to it.
at::Tensor plus(at::Tensor y, const Terms& terms);
/// t [..., out] times the gain, where there is one: the result of x Wᵀ, or what W is multiplied by.
at::Tensor times_gain(at::Tensor t, const Terms& terms);

/// One frozen matrix, flat, as it travels through operators. Cheap to copy: tensors are shared.
struct Weight {
  std::vector<at::Tensor> parts;
  Format format = Format::dense;
  int64_t out = 0;
  int64_t in = 0;

  /// W as a plain matrix [out, in].
  static Weight dense(at::Tensor w);
  /// W held as its transpose [in, out].
  static Weight dense_transposed(at::Tensor w);
  /// From an operator's arguments; throws when parts, format and shape do not fit each other.
  static Weight from_parts(std::vector<at::Tensor> parts, int64_t format, int64_t out, int64_t in);

  /// x Wᵀ + terms: [..., in] -> [..., out].
  at::Tensor linear(const at::Tensor& x, const Terms& terms = {}) const;
  /// dY W + terms: [..., out] -> [..., in]; the gradient of linear with respect to x.
  at::Tensor backward_input(const at::Tensor& grad, const Terms& terms = {}) const;
  /// Gradient with respect to W [out, in]; only for forms that can be trained (dense ones).
  at::Tensor backward_weight(const at::Tensor& grad, const at::Tensor& x) const;
  /// Rows [begin, end) as [end - begin, in] in the given dtype; may share storage with the weight.
  at::Tensor rows(int64_t begin, int64_t end, at::ScalarType dtype) const;
  /// Rows chosen by ids (int64, any shape): [..., in]. What an embedding table does.
  at::Tensor gather(const at::Tensor& ids, at::ScalarType dtype) const;

  /// dtype of the values the weight stands for; float32 for packed ones.
  at::ScalarType dtype() const;
  /// True when the parts are codes, which no cast of a module may touch.
  bool packed() const;
  /// Bytes of all parts.
  int64_t bytes() const;
};

/// The arithmetic of one Format. Stateless; one instance per format, added by register_form.
class WeightForm {
 public:
  virtual ~WeightForm() = default;
  virtual std::string name() const = 0;
  virtual void check(const Weight& w) const = 0;
  virtual at::Tensor linear(const Weight& w, const at::Tensor& x) const = 0;
  virtual at::Tensor backward_input(const Weight& w, const at::Tensor& grad) const = 0;
  /// The same with terms; here in two passes.
  virtual at::Tensor linear_plus(const Weight& w, const at::Tensor& x, const Terms& terms) const;
  virtual at::Tensor backward_input_plus(const Weight& w, const at::Tensor& grad,
                                         const Terms& terms) const;
  virtual at::Tensor backward_weight(const Weight& w, const at::Tensor& grad,
                                     const at::Tensor& x) const;
  virtual at::Tensor rows(const Weight& w, int64_t begin, int64_t end,
                          at::ScalarType dtype) const = 0;
  virtual at::Tensor gather(const Weight& w, const at::Tensor& ids, at::ScalarType dtype) const;
  virtual at::ScalarType dtype(const Weight& w) const = 0;
  virtual bool packed() const { return false; }
};

/// Adds a form; called from a static object in the form's own source file.
bool register_form(Format format, std::unique_ptr<WeightForm> form);

/// The form of a format; throws Error for a number nobody registered.
const WeightForm& form_of(Format format);

}  // namespace budwood::quant
