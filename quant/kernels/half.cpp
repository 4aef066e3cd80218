#include <budwood/quant/kernels/half.h>
#include <budwood/quant/kernels/half_paths.h>
#include <budwood/quant/kernels/isa.h>

namespace budwood::quant::kernels {
namespace {

// Through memcpy: rows of a mapped file may be unaligned.
template <auto convert, class From, class To>
void convert_row(const From* src, To* dst, int64_t n) {
  const auto* from = reinterpret_cast<const char*>(src);
  auto* to = reinterpret_cast<char*>(dst);
  for (int64_t i = 0; i < n; ++i, from += sizeof(From), to += sizeof(To)) {
    From value;
    std::memcpy(&value, from, sizeof value);
    const To result = convert(value);
    std::memcpy(to, &result, sizeof result);
  }
}

const HalfPath& path() {
  return active_path(kHalfScalar, kHalfAvx2, kHalfAvx512);
}

}  // namespace

constexpr float (*kFromFp16)(uint16_t) = fp16_to_fp32;
constexpr float (*kFromBf16)(uint16_t) = bf16_to_fp32;
constexpr uint16_t (*kToFp16)(float) = fp32_to_fp16;
constexpr uint16_t (*kToBf16)(float) = fp32_to_bf16;

const HalfPath kHalfScalar = {
    convert_row<kFromFp16, uint16_t, float>, convert_row<kFromBf16, uint16_t, float>,
    convert_row<kToFp16, float, uint16_t>, convert_row<kToBf16, float, uint16_t>};

void fp16_to_fp32(const uint16_t* src, float* dst, int64_t n) {
  path().fp16_to_fp32(src, dst, n);
}
void bf16_to_fp32(const uint16_t* src, float* dst, int64_t n) {
  path().bf16_to_fp32(src, dst, n);
}
void fp32_to_fp16(const float* src, uint16_t* dst, int64_t n) {
  path().fp32_to_fp16(src, dst, n);
}
void fp32_to_bf16(const float* src, uint16_t* dst, int64_t n) {
  path().fp32_to_bf16(src, dst, n);
}

void fp32_to(FloatType type, const float* src, void* dst, int64_t n) {
  switch (type) {
    case FloatType::fp32:
      if (n > 0) {
        std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      }
      return;
    case FloatType::bf16:
      fp32_to_bf16(src, static_cast<uint16_t*>(dst), n);
      return;
    case FloatType::fp16:
      fp32_to_fp16(src, static_cast<uint16_t*>(dst), n);
      return;
  }
}

void to_fp32(FloatType type, const void* src, float* dst, int64_t n) {
  switch (type) {
    case FloatType::fp32:
      if (n > 0) {
        std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      }
      return;
    case FloatType::bf16:
      bf16_to_fp32(static_cast<const uint16_t*>(src), dst, n);
      return;
    case FloatType::fp16:
      fp16_to_fp32(static_cast<const uint16_t*>(src), dst, n);
      return;
  }
}

}  // namespace budwood::quant::kernels
