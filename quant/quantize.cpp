#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/quant/calibrate/hqq.h>
#include <budwood/quant/device_products.h>
#include <budwood/quant/error.h>
#include <budwood/quant/fork.h>
#include <budwood/quant/kernels/affine.h>
#include <budwood/quant/kernels/bnb4.h>
#include <budwood/quant/kernels/int8.h>
#include <budwood/quant/large_pages.h>
#include <budwood/quant/nested_scales.h>
#include <budwood/quant/quantize.h>
#include <algorithm>
#include <array>
#include <functional>
#include <vector>

namespace budwood::quant {
namespace {

using kernels::Fault;
using kernels::QuantizeStatus;

constexpr std::array<const char*, 5> kFormats = {"nf4", "fp4", "int8", "int4", "affine8"};
// Elements of one working copy in fp32; a multiple of every block size.
constexpr int64_t kPanelElements = 1 << 16;

at::Tensor bytes_of(at::IntArrayRef shape) {
  return empty_result(shape, at::TensorOptions().dtype(at::kByte));
}
at::Tensor floats_of(at::IntArrayRef shape) {
  return at::empty(shape, at::TensorOptions().dtype(at::kFloat));
}
at::Tensor one_integer(int64_t value, at::Device device = at::kCPU) {
  return at::full({1}, value, at::TensorOptions().dtype(at::kLong).device(device));
}

[[noreturn]] void refuse(const at::Tensor& w, const QuantizeStatus& status, int64_t element) {
  const int64_t row = element / w.size(1), column = element % w.size(1);
  throw Error("quantize",
              fmt::format("row {}, column {} is {}, {}", row, column, w[row][column].item<double>(),
                          status.fault == Fault::not_finite ? "which is not finite in float32"
                                                            : "whose scale is beyond float32"));
}

// Runs one(begin, end, values) over pieces of `step` elements of the flat matrix, in fp32. `one`
// returns the first fault with an index into the whole matrix.
void for_pieces(const at::Tensor& w, int64_t step,
                const std::function<QuantizeStatus(int64_t, int64_t, const float*)>& one) {
  const auto flat = w.view({-1});
  const int64_t n = flat.numel(), pieces = (n + step - 1) / step;
  std::vector<QuantizeStatus> faults(static_cast<size_t>(pieces));
  prepare_for_fork();
  at::parallel_for(0, pieces, 1, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) {
      const int64_t begin = p * step, end = std::min(n, begin + step);
      const auto values = flat.slice(0, begin, end).to(at::kFloat);
      faults[static_cast<size_t>(p)] = one(begin, end, values.const_data_ptr<float>());
    }
  });
  for (const auto& fault : faults)
    if (!fault.ok()) refuse(w, fault, fault.index);
}

QuantizeStatus moved(QuantizeStatus status, int64_t by) {
  if (!status.ok()) status.index += by;
  return status;
}

Weight to_bnb4(const at::Tensor& w, const QuantizeOptions& options) {
  const auto type = options.format == "nf4" ? kernels::Bnb4Type::nf4 : kernels::Bnb4Type::fp4;
  const int64_t size = options.block_size, n = w.numel(), out = w.size(0), in = w.size(1);
  if (!kernels::is_bnb4_block_size(size))
    throw Error("quantize",
                fmt::format("block size {}; wanted a power of two from 32 to 4096", size));
  const auto format = options.format == "nf4" ? Format::nf4 : Format::fp4;
  auto codes =
      at::empty(in % size == 0 ? std::vector{out, in / 2} : std::vector{kernels::bnb4_bytes(n)},
                w.options().dtype(at::kByte));
  auto absmax = at::empty({kernels::bnb4_blocks(n, size)}, w.options().dtype(at::kFloat));
  if (const auto* device = device_products(w.device())) {
    const auto values = w.scalar_type() == at::kDouble ? w.to(at::kFloat) : w;
    if (const auto bad = device->encode_4bit(values, format, size, codes, absmax))
      refuse(w, {Fault::not_finite, *bad}, *bad);
  } else {
    auto* code = codes.mutable_data_ptr<uint8_t>();
    auto* scale = absmax.mutable_data_ptr<float>();
    for_pieces(w, kPanelElements, [&](int64_t begin, int64_t end, const float* values) {
      return moved(kernels::quantize_bnb4(type, values, end - begin, size, code + begin / 2,
                                          scale + begin / size),
                   begin);
    });
  }
  Weight result{{codes, absmax, one_integer(size, w.device())}, format, out, in};
  if (!options.double_quant) return result;
  // Few, so they are taken to the CPU from wherever they are.
  const auto nested = nest_scales(absmax.cpu());
  if (!nested.status.ok()) refuse(w, {Fault::out_of_range, 0}, nested.status.index * size);
  result.parts = {codes,
                  nested.codes.to(w.device()),
                  result.parts[2],
                  nested.absmax.to(w.device()),
                  nested.map.to(w.device()),
                  nested.offset.to(w.device())};
  return result;
}

Weight to_int8(const at::Tensor& w) {
  const int64_t out = w.size(0), in = w.size(1);
  auto codes = at::empty({out, in}, at::TensorOptions().dtype(at::kChar));
  auto scales = floats_of({out});
  auto* code = codes.mutable_data_ptr<int8_t>();
  auto* scale = scales.mutable_data_ptr<float>();
  for_pieces(w, in, [&](int64_t begin, int64_t, const float* values) {
    return moved(kernels::quantize_int8_row(values, in, code + begin, scale + begin / in), begin);
  });
  return {{codes, scales}, Format::int8_rows, out, in};
}

Weight to_affine(const at::Tensor& w, const QuantizeOptions& options) {
  const int bits = options.format == "int4" ? 4 : 8;
  const int64_t out = w.size(0), in = w.size(1), size = options.block_size;
  if (size < 1)
    throw Error("quantize", fmt::format("a group has at least 1 element, found {}", size));
  if (options.method == "hqq") return calibrate::hqq(w, {.bits = bits, .group_size = size});
  const int64_t bytes = kernels::affine_row_bytes(bits, in),
                groups = kernels::affine_groups(in, size);
  auto codes = bytes_of({out, bytes}), zeros = bytes_of({out, groups});
  auto scales = floats_of({out, groups});
  auto* code = codes.mutable_data_ptr<uint8_t>();
  auto* zero = zeros.mutable_data_ptr<uint8_t>();
  auto* scale = scales.mutable_data_ptr<float>();
  const auto mode =
      options.symmetric ? kernels::AffineMode::symmetric : kernels::AffineMode::asymmetric;
  for_pieces(w, in, [&](int64_t begin, int64_t, const float* values) {
    const int64_t row = begin / in;
    return moved(kernels::quantize_affine_row(bits, mode, values, in, size, code + row * bytes,
                                              scale + row * groups, zero + row * groups),
                 begin);
  });
  return {{codes, scales, zeros, one_integer(size)},
          bits == 4 ? Format::affine4 : Format::affine8,
          out,
          in};
}

bool is_affine(const std::string& format) {
  return format == "int4" || format == "affine8";
}

}  // namespace

void require_quantizable(const std::string& format) {
  if (std::find(kFormats.begin(), kFormats.end(), format) == kFormats.end())
    throw Error("quantize",
                fmt::format("unknown format '{}'; known: {}", format, fmt::join(kFormats, ", ")));
}

void require_method(const std::string& format, const std::string& method) {
  if (method == "rtn" || (method == "hqq" && is_affine(format))) return;
  throw Error("quantize", fmt::format("method '{}' for '{}'; known: rtn, and hqq for int4 and "
                                      "affine8",
                                      method, format));
}

Weight quantize(const at::Tensor& w, const QuantizeOptions& options) {
  require_quantizable(options.format);
  require_method(options.format, options.method);
  if (options.symmetric && (!is_affine(options.format) || options.method != "rtn"))
    throw Error("quantize",
                fmt::format("symmetric is for int4 and affine8 with rtn, found '{}' with {}",
                            options.format, options.method));
  if (w.dim() != 2 || w.numel() == 0 || !at::isFloatingType(w.scalar_type()))
    throw Error("quantize",
                fmt::format("wanted a floating point matrix that is not empty, found {} "
                            "dimensions, {} elements of {}",
                            w.dim(), w.numel(), c10::toString(w.scalar_type())));
  if (!w.is_cpu() && !device_products(w.device()))
    throw Error("quantize", fmt::format("in this build matrices are quantised on {}, found one on "
                                        "{}: build with BUDWOOD_CUDA=ON for CUDA",
                                        fmt::join(packed_devices(), ", "), w.device().str()));
  const bool bnb4 = options.format == "nf4" || options.format == "fp4";
  if (options.double_quant && !bnb4)
    throw Error("quantize",
                fmt::format("double quantisation is for nf4 and fp4, found '{}'", options.format));
  const auto plain = w.detach().contiguous();
  if (bnb4) return to_bnb4(plain, options);
  // No kernels of their own on other devices: made on the CPU and taken there.
  auto result = options.format == "int8" ? to_int8(plain.cpu()) : to_affine(plain.cpu(), options);
  for (auto& part : result.parts) part = part.to(w.device());
  return result;
}

}  // namespace budwood::quant
