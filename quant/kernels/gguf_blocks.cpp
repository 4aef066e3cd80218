#include <budwood/quant/error.h>
#include <budwood/quant/kernels/gguf_blocks.h>
#include <budwood/quant/kernels/gguf_blocks_paths.h>
#include <budwood/quant/kernels/half.h>
#include <budwood/quant/kernels/isa.h>
#include <fmt/format.h>

#include <cmath>

namespace budwood::quant::kernels {
namespace {

int64_t checked_blocks(const char* where, GgmlType type, int64_t n) {
  const auto* traits = ggml_type_traits(static_cast<uint32_t>(type));
  if (!traits || !traits->decodable) {
    throw Error(where,
                fmt::format("ggml type {} ({}) is not supported; wanted {}", ggml_type_name(type),
                            static_cast<uint32_t>(type), decodable_ggml_types()));
  }
  if (n < 0 || n % traits->block != 0) {
    throw Error(where, fmt::format("{} elements of {}; wanted a multiple of its block of {}", n,
                                   traits->name, traits->block));
  }
  return n / traits->block;
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
    default:
      return nullptr;
  }
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
                             int64_t blocks, const GgmlTypeTraits& traits) {
  for (int64_t b = 0; b < blocks; ++b) {
    const float* block = src + b * traits.block;
    if (!encode(block, dst + b * traits.block_bytes)) {
      const int64_t begin = b * traits.block;
      const int64_t bad = first_not_finite(block, traits.block);
      if (bad >= 0) {
        return {Fault::not_finite, begin + bad};
      }
      return {Fault::out_of_range, begin + largest_magnitude(block, traits.block)};
    }
  }
  return {};
}

}  // namespace

int64_t row_bytes(GgmlType type, int64_t n) {
  return checked_blocks("row_bytes", type, n) * ggml_type_traits(type).block_bytes;
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

QuantizeStatus quantize_row(GgmlType type, const float* src, void* dst, int64_t n) {
  const int64_t blocks = checked_blocks("quantize_row", type, n);
  const auto& traits = ggml_type_traits(type);
  auto* bytes = static_cast<uint8_t*>(dst);
  auto* halves = static_cast<uint16_t*>(dst);
  if (!traits.writable) {
    throw Error("quantize_row", fmt::format("{} can be read but not written; wanted {}",
                                            traits.name, writable_ggml_types()));
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
      return encode_blocks(encoders().q4_0, src, bytes, blocks, traits);
    case GgmlType::q4_1:
      return encode_blocks(encoders().q4_1, src, bytes, blocks, traits);
    case GgmlType::q8_0:
      return encode_blocks(encoders().q8_0, src, bytes, blocks, traits);
    default:
      std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      return check_finite(src, n);
  }
}

}  // namespace budwood::quant::kernels
