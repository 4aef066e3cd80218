#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/peft/models/quantizing_source.h>
#include <budwood/quant/error.h>
#include <budwood/quant/memory_pool.h>

namespace budwood::models {

QuantizingSource::QuantizingSource(WeightSource& source, quant::QuantizeOptions options,
                                   std::vector<std::string> skip, QuantizeObserver observer)
    : source_(source),
      options_(std::move(options)),
      skip_(std::move(skip)),
      observer_(std::move(observer)) {}

QuantizingSource::~QuantizingSource() {
  quant::trim_heap();
}

quant::Weight QuantizingSource::matrix(const std::string& name, int64_t out, int64_t in) {
  return packed(name, source_.matrix(name, out, in));
}

quant::Weight QuantizingSource::transposed_matrix(const std::string& name, int64_t out,
                                                  int64_t in) {
  return packed(name, source_.transposed_matrix(name, out, in));
}

quant::Weight QuantizingSource::packed(const std::string& name, quant::Weight weight) {
  bool skipped = false;
  for (const auto& part : skip_) {
    if (name.find(part) == std::string::npos) continue;
    skipped = true;
    used_skips_.insert(part);
  }
  if (skipped) return weight;
  if (weight.packed())
    throw Error("load", fmt::format("the tensor '{}' is quantised already ({}): load it as it is",
                                    name, quant::form_of(weight.format).name()));
  try {
    auto packed =
        quant::quantize(weight.rows(0, weight.out, weight.dtype()).contiguous(), options_);
    if (observer_) observer_(name, weight, packed);
    source_.release(name);
    // Plain matrices that were read and freed leave holes between the packed ones, which stay.
    const int64_t freed = weight.bytes();
    weight = {};
    quant::trim_heap_after(freed);
    return packed;
  } catch (const Error& e) {
    throw Error("load", fmt::format("the tensor '{}' cannot be quantised: {}", name, e.what()));
  }
}

std::vector<std::string> QuantizingSource::unused_skips() const {
  std::vector<std::string> unused;
  for (const auto& part : skip_)
    if (!used_skips_.contains(part)) unused.push_back(part);
  return unused;
}

}  // namespace budwood::models
