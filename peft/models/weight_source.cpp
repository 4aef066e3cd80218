#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/weight_source.h>
#include <budwood/quant/error.h>

namespace budwood::models {

quant::Weight WeightSource::transposed_matrix(const std::string& name, int64_t, int64_t) {
  throw Error("load", fmt::format("'{}' is stored as its transpose, which this kind of file cannot "
                                  "be read with",
                                  name));
}

}  // namespace budwood::models
