#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/quant/error.h>
#include <budwood/quant/packed_form.h>
#include <limits>

namespace budwood::quant {

void PackedForm::check_parts(const Weight& w, size_t least, size_t most) const {
  if (w.parts.size() < least || w.parts.size() > most)
    throw Error("weight", fmt::format("a {} weight has {} parts, found {}", name(),
                                      least == most ? fmt::format("{}", least)
                                                    : fmt::format("{} or {}", least, most),
                                      w.parts.size()));
  if (w.out < 1 || w.in < 1 || w.out > std::numeric_limits<int64_t>::max() / 8 / w.in)
    throw Error("weight", fmt::format("a {} weight has a positive shape, found [{}, {}]", name(),
                                      w.out, w.in));
}

void PackedForm::check_part(const Weight& w, size_t i, const char* what, at::ScalarType type,
                            int64_t count) const {
  const auto& part = w.parts[i];
  const auto device = w.parts[0].device();
  if (!part.is_cpu() && !device_products(part.device()))
    throw Error("weight",
                fmt::format("in this build a {} weight works on {}, its {} are on {}: build with "
                            "BUDWOOD_CUDA=ON for CUDA, or load the model with dense weights",
                            name(), fmt::join(packed_devices(), ", "), what, part.device().str()));
  if (part.device() != device)
    throw Error("weight", fmt::format("the {} of a {} weight are on {}, its codes on {}", what,
                                      name(), part.device().str(), device.str()));
  if (part.scalar_type() != type || part.numel() != count || !part.is_contiguous())
    throw Error(
        "weight",
        fmt::format("the {} of a {} weight [{}, {}] are {} contiguous elements of {}, found "
                    "{} of {}{}",
                    what, name(), w.out, w.in, count, c10::toString(type), part.numel(),
                    c10::toString(part.scalar_type()),
                    part.is_contiguous() ? "" : ", not contiguous"));
}

int64_t PackedForm::size_in_part(const Weight& w, size_t i, const char* what) const {
  const auto& part = w.parts[i];
  if (part.scalar_type() != at::kLong || part.numel() != 1)
    throw Error("weight", fmt::format("the {} of a {} weight is one int64, found {} of {}", what,
                                      name(), part.numel(), c10::toString(part.scalar_type())));
  if (!part.is_cpu()) return 0;
  const int64_t size = *w.parts[i].const_data_ptr<int64_t>();
  if (size < 1)
    throw Error("weight",
                fmt::format("the {} of a {} weight is positive, found {}", what, name(), size));
  return size;
}

}  // namespace budwood::quant
