#pragma once

#include <budwood/peft/models/weight_source.h>
#include <budwood/quant/quantize.h>
#include <functional>
#include <set>

namespace budwood::models {

/// Called with each matrix before and after it was packed.
using QuantizeObserver = std::function<void(const std::string& name, const quant::Weight& plain,
                                            const quant::Weight& packed)>;

/// Another source whose matrices are quantised one by one as they are asked for; vectors are not,
/// nor are matrices whose names contain one of `skip`. The other source outlives it.
class QuantizingSource final : public WeightSource {
 public:
  QuantizingSource(WeightSource& source, quant::QuantizeOptions options,
                   std::vector<std::string> skip, QuantizeObserver observer = {});
  ~QuantizingSource() override;
  QuantizingSource(const QuantizingSource&) = delete;
  QuantizingSource& operator=(const QuantizingSource&) = delete;

  bool has(const std::string& name) const override { return source_.has(name); }
  quant::Weight matrix(const std::string& name, int64_t out, int64_t in) override;
  quant::Weight transposed_matrix(const std::string& name, int64_t out, int64_t in) override;
  at::Tensor vector(const std::string& name, int64_t size) override {
    return source_.vector(name, size);
  }
  at::ScalarType dtype() const override { return source_.dtype(); }
  void release(const std::string& name) override { source_.release(name); }
  std::vector<std::string> unused() const override { return source_.unused(); }
  /// Entries of `skip` that no matrix's name contained.
  std::vector<std::string> unused_skips() const;

 private:
  quant::Weight packed(const std::string& name, quant::Weight weight);

  WeightSource& source_;
  quant::QuantizeOptions options_;
  std::vector<std::string> skip_;
  QuantizeObserver observer_;
  std::set<std::string> used_skips_;
};

}  // namespace budwood::models
