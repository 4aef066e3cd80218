#include <ATen/ATen.h>
#include <fmt/format.h>

#include <budwood/quant/device_products.h>
#include <budwood/quant/error.h>
#include <budwood/quant/kernels/device/rows_device.h>
#include <algorithm>
#include <array>

namespace budwood::quant {
namespace {

// A decoded panel is no larger.
constexpr int64_t kPanelBytes = 64 << 20;

using Table = std::array<std::unique_ptr<DeviceProducts>, c10::COMPILE_TIME_MAX_DEVICE_TYPES>;

Table& table() {
  static Table products;
  return products;
}

/// The type that the kernels write of those a caller may ask for.
at::ScalarType written_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
    case at::kBFloat16:
    case at::kHalf:
      return type;
    case at::kDouble:
      return at::kFloat;
    default:
      throw Error("weight", fmt::format("a packed weight has no values in {}; wanted float32, "
                                        "bfloat16, float16 or float64",
                                        c10::toString(type)));
  }
}

void check_place(const char* where, const Weight& w, const at::Tensor& x) {
  if (x.device() != w.parts[0].device())
    throw Error(where, fmt::format("the weight is on {}, found a tensor on {}",
                                   w.parts[0].device().str(), x.device().str()));
}

at::Tensor empty_on(const Weight& w, at::IntArrayRef shape, at::ScalarType type) {
  return at::empty(shape, at::TensorOptions().dtype(type).device(w.parts[0].device()));
}

at::Tensor with_last(const at::Tensor& flat, const at::Tensor& like, int64_t last) {
  auto shape = like.sizes().vec();
  shape.back() = last;
  return flat.view(shape);
}

}  // namespace

// Calls use(first row, panel [count, in]) for all rows.
template <class Use>
void DeviceProducts::for_panels(const Weight& w, at::ScalarType type, const Use& use) const {
  const int64_t bytes = w.in * static_cast<int64_t>(c10::elementSize(type));
  const int64_t step = std::clamp<int64_t>(kPanelBytes / bytes, 1, w.out);
  auto buffer = empty_on(w, {step, w.in}, written_type(type));
  for (int64_t begin = 0; begin < w.out; begin += step) {
    auto panel = buffer.narrow(0, 0, std::min(step, w.out - begin));
    decode(w, begin, {}, panel);
    use(begin, panel.to(type));
  }
}

at::Tensor DeviceProducts::linear(const Weight& w, const at::Tensor& x) const {
  check_place("linear", w, x);
  const auto flat = x.detach().reshape({-1, w.in}).contiguous();
  const int64_t tokens = flat.size(0);
  auto y = at::empty({tokens, w.out}, x.options());
  if (tokens > 0 && tokens <= kernels::kFewTokens &&
      x.scalar_type() == written_type(x.scalar_type())) {
    multiply_few(w, flat, y);
  } else if (tokens > 0) {
    for_panels(w, x.scalar_type(), [&](int64_t begin, const at::Tensor& panel) {
      auto columns = y.narrow(1, begin, panel.size(0));
      at::mm_out(columns, flat, panel.t());
    });
  }
  return with_last(y, x, w.out);
}

at::Tensor DeviceProducts::backward_input(const Weight& w, const at::Tensor& grad) const {
  check_place("linear_backward_input", w, grad);
  const auto type = grad.scalar_type();
  const auto flat = grad.detach().reshape({-1, w.out});
  const auto wide = type == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor sum;
  if (flat.size(0) > 0) {
    for_panels(w, type, [&](int64_t begin, const at::Tensor& panel) {
      const auto product = flat.narrow(1, begin, panel.size(0)).mm(panel);
      // A weight of one panel needs no sum and no second rounding.
      if (panel.size(0) == w.out)
        sum = product;
      else if (begin == 0)
        sum = product.to(wide);
      else
        sum.add_(product);
    });
  } else {
    sum = at::empty({0, w.in}, grad.options());
  }
  return with_last(sum.to(type), grad, w.in);
}

at::Tensor DeviceProducts::rows(const Weight& w, int64_t begin, int64_t end,
                                at::ScalarType dtype) const {
  auto result = empty_on(w, {end - begin, w.in}, written_type(dtype));
  if (end > begin) decode(w, begin, {}, result);
  return result.to(dtype);
}

at::Tensor DeviceProducts::gather(const Weight& w, const at::Tensor& ids,
                                  at::ScalarType dtype) const {
  check_place("gather", w, ids);
  const auto flat = ids.to(at::kLong).reshape({-1}).contiguous();
  auto result = empty_on(w, {flat.numel(), w.in}, written_type(dtype));
  if (flat.numel() > 0) decode(w, 0, flat, result);
  auto shape = ids.sizes().vec();
  shape.push_back(w.in);
  return result.to(dtype).view(shape);
}

bool register_device_products(c10::DeviceType type, std::unique_ptr<DeviceProducts> products) {
  table()[static_cast<size_t>(type)] = std::move(products);
  return true;
}

const DeviceProducts* device_products(c10::Device device) {
  return table()[static_cast<size_t>(device.type())].get();
}

std::vector<std::string> packed_devices() {
  std::vector<std::string> names = {"cpu"};
  for (size_t type = 0; type < table().size(); ++type)
    if (table()[type])
      names.push_back(c10::DeviceTypeName(static_cast<c10::DeviceType>(type), true));
  return names;
}

}  // namespace budwood::quant
