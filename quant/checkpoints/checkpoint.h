#pragma once

#include <budwood/quant/weight.h>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

/// How folders of quantised models store a matrix: as several tensors below the path of its layer,
/// described once by `quantization_config` in config.json.
namespace budwood::quant {

/// The tensors of one layer by their names below its path ("weight", "weight.absmax", "qweight"),
/// bias left out.
using StoredParts = std::map<std::string, at::Tensor>;

/// One way of storing, named by `quant_method`. Stateless but for the configuration it was made of.
class Checkpoint {
 public:
  virtual ~Checkpoint() = default;

  /// Whether these tensors hold a packed matrix; false for a layer that was left plain.
  virtual bool packed(const StoredParts& parts) const = 0;
  /// {out, in} of a packed matrix, from dtypes and sizes of its parts; of parts that hold numbers
  /// of a matrix the values are not read. Throws Error when they tell nothing.
  virtual std::pair<int64_t, int64_t> shape(const StoredParts& parts) const = 0;
  /// The matrix [out, in]. Parts are used where they lie when they are laid out as we need them.
  /// Throws Error for a part that is missing, unknown or of the wrong dtype or size.
  virtual Weight read(const StoredParts& parts, int64_t out, int64_t in) const = 0;
};

/// Makes the reader of a `quantization_config`, given as JSON text. Throws Error for an unknown
/// quant_method and for settings that the method's reader does not know.
std::unique_ptr<Checkpoint> open_checkpoint(const std::string& quantization_config);

using CheckpointFactory = std::function<std::unique_ptr<Checkpoint>(const std::string&)>;
/// Adds a quant_method; called from a static object in the reader's own source file.
bool register_checkpoint(const std::string& quant_method, CheckpointFactory factory);

/// What a folder of packed weights is written from.
struct CheckpointWriter {
  /// The text of `quantization_config`. `plain` lists the layers that are not packed.
  std::function<std::string(const std::vector<std::string>& plain)> config;
  std::function<StoredParts(const Weight& weight)> parts;
};

/// The writer for weights of these forms: bitsandbytes' layout for nf4, fp4 and int8, Budwood's own
/// (docs/formats.md) for int4 and affine8. dtype: of the values that the codes stand for. Throws
/// Error when one folder cannot hold them all.
CheckpointWriter checkpoint_writer(const std::vector<const Weight*>& weights, at::ScalarType dtype);

/// A packed matrix's parts, made anew from the values of a matrix [out, in] in fp32, rounded to
/// nearest with the form, block size and options of `like`. Throws Error for forms that are not
/// made here (K-quants).
Weight requantize(const at::Tensor& w, const Weight& like);

/// A group-affine weight with its zero points moved by -change / scale, fp32, so that it stands for
/// W plus `change` [out, groups] in all columns of a group; codes and scales are the same. The
/// exact merge of QA-LoRA. Throws Error for other forms, for groups that are not neighbours (GPTQ's
/// act-order) and for a scale of 0 where there is a change.
Weight with_moved_zeros(const Weight& w, const at::Tensor& change);

// What readers check parts with; errors name the part, what was found and what was wanted.

/// The part, whatever it is.
at::Tensor required_part(const StoredParts& parts, const std::string& name);
/// The part, of that dtype and number of elements, contiguous.
at::Tensor take_part(const StoredParts& parts, const std::string& name, at::ScalarType type,
                     int64_t count);
/// Throws for a part that is none of `known`.
void refuse_other_parts(const StoredParts& parts, const std::vector<std::string>& known);

}  // namespace budwood::quant
