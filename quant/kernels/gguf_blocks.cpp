#include <budwood/quant/error.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <budwood/quant/kernels/gguf_blocks_paths.h>
#include <budwood/quant/kernels/half.h>
#include <budwood/quant/kernels/isa.h>
#include <fmt/format.h>

#include <cmath>
#include <iterator>

namespace budwood::quant::kernels {
namespace {

struct Layout {
  int64_t elements;  ///< 0: not supported
  int64_t bytes;
};

Layout layout_of(GgmlType type) {
  switch (type) {
    case GgmlType::f32:
      return {1, 4};
    case GgmlType::f16:
    case GgmlType::bf16:
      return {1, 2};
    case GgmlType::q4_0:
      return {32, 18};
    case GgmlType::q4_1:
      return {32, 20};
    case GgmlType::q5_0:
      return {32, 22};
    case GgmlType::q5_1:
      return {32, 24};
    case GgmlType::q8_0:
      return {32, 34};
    case GgmlType::q4_k:
      return {256, 144};
    case GgmlType::q5_k:
      return {256, 176};
    case GgmlType::q6_k:
      return {256, 210};
  }
  return {0, 0};
}

Layout checked_layout(const char* where, GgmlType type) {
  const Layout layout = layout_of(type);
  if (layout.elements == 0) {
    throw Error(where,
                fmt::format("ggml type {} ({}) is not supported; wanted F32, F16, BF16, Q4_0, "
                            "Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K",
                            ggml_type_name(type), static_cast<uint32_t>(type)));
  }
  return layout;
}

int64_t checked_blocks(const char* where, GgmlType type, int64_t n) {
  const Layout layout = checked_layout(where, type);
  if (n < 0 || n % layout.elements != 0) {
    throw Error(where, fmt::format("{} elements of {}; wanted a multiple of its block of {}", n,
                                   ggml_type_name(type), layout.elements));
  }
  return n / layout.elements;
}

const GgufPath& path() {
  return active_path(kGgufScalar, kGgufAvx2, kGgufAvx512);
}

const GgufEncoders& encoders() {
  return active_path(kGgufEncodeScalar, kGgufEncodeAvx2, kGgufEncodeAvx2);
}

GgufPath::Decode decoder_of(GgmlType type) {
  switch (type) {
    case GgmlType::f32:
      return [](const uint8_t* src, float* dst, int64_t n) {
        std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      };
    case GgmlType::f16:
      return [](const uint8_t* src, float* dst, int64_t n) {
        fp16_to_fp32(reinterpret_cast<const uint16_t*>(src), dst, n);
      };
    case GgmlType::bf16:
      return [](const uint8_t* src, float* dst, int64_t n) {
        bf16_to_fp32(reinterpret_cast<const uint16_t*>(src), dst, n);
      };
    case GgmlType::q4_0:
      return path().q4_0;
    case GgmlType::q4_1:
      return path().q4_1;
    case GgmlType::q5_0:
      return path().q5_0;
    case GgmlType::q5_1:
      return path().q5_1;
    case GgmlType::q8_0:
      return path().q8_0;
    case GgmlType::q4_k:
      return path().q4_k;
    case GgmlType::q5_k:
      return path().q5_k;
    case GgmlType::q6_k:
      return path().q6_k;
  }
  return nullptr;
}

int64_t first_not_finite(const float* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(src[i])) {
      return i;
    }
  }
  return -1;
}

int64_t largest_magnitude(const float* src, int64_t n) {
  int64_t most = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (std::fabs(src[i]) > std::fabs(src[most])) {
      most = i;
    }
  }
  return most;
}

QuantizeStatus check_finite(const float* src, int64_t n) {
  const int64_t bad = first_not_finite(src, n);
  return bad < 0 ? QuantizeStatus{} : QuantizeStatus{Fault::not_finite, bad};
}

/// Where a 16-bit float of a finite number became infinite.
QuantizeStatus check_halves(const float* src, const uint16_t* halves, int64_t n,
                            uint32_t infinity) {
  const QuantizeStatus status = check_finite(src, n);
  if (!status.ok()) {
    return status;
  }
  for (int64_t i = 0; i < n; ++i) {
    uint16_t half;
    std::memcpy(&half, reinterpret_cast<const char*>(halves) + 2 * i, sizeof half);
    if ((half & 0x7fffu) == infinity) {
      return {Fault::out_of_range, i};
    }
  }
  return {};
}

QuantizeStatus encode_blocks(GgufEncoders::Encode encode, const float* src, uint8_t* dst,
                             int64_t blocks, Layout layout) {
  for (int64_t b = 0; b < blocks; ++b) {
    const float* block = src + b * layout.elements;
    if (!encode(block, dst + b * layout.bytes)) {
      const int64_t begin = b * layout.elements;
      const int64_t bad = first_not_finite(block, layout.elements);
      if (bad >= 0) {
        return {Fault::not_finite, begin + bad};
      }
      return {Fault::out_of_range, begin + largest_magnitude(block, layout.elements)};
    }
  }
  return {};
}

}  // namespace

const char* ggml_type_name(uint32_t id) {
  static constexpr const char* kNames[] = {
      "F32",   "F16",     "Q4_0",    "Q4_1",    "type 4",  "type 5",  "Q5_0",
      "Q5_1",  "Q8_0",    "Q8_1",    "Q2_K",    "Q3_K",    "Q4_K",    "Q5_K",
      "Q6_K",  "Q8_K",    "IQ2_XXS", "IQ2_XS",  "IQ3_XXS", "IQ1_S",   "IQ4_NL",
      "IQ3_S", "IQ2_S",   "IQ4_XS",  "I8",      "I16",     "I32",     "I64",
      "F64",   "IQ1_M",   "BF16",    "type 31", "type 32", "type 33", "TQ1_0",
      "TQ2_0", "type 36", "type 37", "type 38", "MXFP4",   "NVFP4",   "Q1_0"};
  return id < std::size(kNames) ? kNames[id] : "unknown";
}

bool is_supported_ggml_type(uint32_t id) {
  return layout_of(static_cast<GgmlType>(id)).elements != 0;
}

int64_t block_elements(GgmlType type) {
  return checked_layout("block_elements", type).elements;
}

int64_t block_bytes(GgmlType type) {
  return checked_layout("block_bytes", type).bytes;
}

int64_t row_bytes(GgmlType type, int64_t n) {
  return checked_blocks("row_bytes", type, n) * layout_of(type).bytes;
}

void dequantize_row(GgmlType type, const void* src, float* dst, int64_t n) {
  dequantize_rows(type, src, 0, 1, dst, 0, n);
}

void dequantize_rows(GgmlType type, const void* src, int64_t src_stride, int64_t rows, float* dst,
                     int64_t dst_stride, int64_t n) {
  const int64_t blocks = checked_blocks("dequantize_row", type, n);
  if (blocks == 0) {
    return;
  }
  const auto decode = decoder_of(type);
  const auto* bytes = static_cast<const uint8_t*>(src);
  for (int64_t r = 0; r < rows; ++r, bytes += src_stride, dst += dst_stride) {
    decode(bytes, dst, blocks);
  }
}

bool can_quantize(GgmlType type) {
  switch (type) {
    case GgmlType::f32:
    case GgmlType::f16:
    case GgmlType::bf16:
    case GgmlType::q4_0:
    case GgmlType::q4_1:
    case GgmlType::q8_0:
      return true;
    default:
      return false;
  }
}

QuantizeStatus quantize_row(GgmlType type, const float* src, void* dst, int64_t n) {
  const int64_t blocks = checked_blocks("quantize_row", type, n);
  const Layout layout = layout_of(type);
  auto* bytes = static_cast<uint8_t*>(dst);
  auto* halves = static_cast<uint16_t*>(dst);
  if (!can_quantize(type)) {
    throw Error("quantize_row",
                fmt::format("{} can be read but not written; wanted F32, F16, BF16, "
                            "Q4_0, Q4_1 or Q8_0",
                            ggml_type_name(type)));
  }
  if (blocks == 0) {
    return {};
  }
  switch (type) {
    case GgmlType::f16:
      fp32_to_fp16(src, halves, n);
      return check_halves(src, halves, n, 0x7c00u);
    case GgmlType::bf16:
      fp32_to_bf16(src, halves, n);
      return check_halves(src, halves, n, 0x7f80u);
    case GgmlType::q4_0:
      return encode_blocks(encoders().q4_0, src, bytes, blocks, layout);
    case GgmlType::q4_1:
      return encode_blocks(encoders().q4_1, src, bytes, blocks, layout);
    case GgmlType::q8_0:
      return encode_blocks(encoders().q8_0, src, bytes, blocks, layout);
    default:
      std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      return check_finite(src, n);
  }
}

}  // namespace budwood::quant::kernels
