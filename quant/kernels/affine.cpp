#include <budwood/quant/error.h>
#include <budwood/quant/kernels/affine.h>
#include <budwood/quant/kernels/affine_paths.h>
#include <budwood/quant/kernels/isa.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace budwood::quant::kernels {
namespace {

void decode_4(const uint8_t* row, int64_t begin, int64_t n, float scale, float zero, float* dst) {
  for (int64_t i = begin; i < begin + n; ++i) {
    const int q = (i & 1) == 0 ? row[i / 2] & 15 : row[i / 2] >> 4;
    *dst++ = (static_cast<float>(q) - zero) * scale;
  }
}

void decode_8(const uint8_t* row, int64_t begin, int64_t n, float scale, float zero, float* dst) {
  for (int64_t i = begin; i < begin + n; ++i) {
    *dst++ = (static_cast<float>(row[i]) - zero) * scale;
  }
}

bool range(const float* src, int64_t n, float* least, float* most) {
  float low = 0.0f;
  float high = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, src[i]);
    high = std::max(high, src[i]);
    finite = finite && std::isfinite(src[i]);
  }
  *least = low;
  *most = high;
  return finite;
}

void encode(const float* src, int64_t n, float scale, int32_t zero, int32_t top, uint8_t* dst) {
  for (int64_t i = 0; i < n; ++i) {
    const int32_t q = static_cast<int32_t>(std::nearbyint(src[i] / scale)) + zero;
    dst[i] = static_cast<uint8_t>(std::clamp(q, 0, top));
  }
}

const AffinePath& path() {
  return active_path(kAffineScalar, kAffineAvx2, kAffineAvx512);
}
const AffineEncoder& encoder() {
  return active_path(kAffineEncodeScalar, kAffineEncodeAvx2, kAffineEncodeAvx2);
}

void check_form(const char* where, int bits, int64_t group_size) {
  if (bits != 4 && bits != 8) {
    throw Error(where, fmt::format("{} bits; wanted 4 or 8", bits));
  }
  if (group_size < 1) {
    throw Error(where, fmt::format("group size {}; wanted 1 or more", group_size));
  }
}

void check_piece(const AffineView& weight, int64_t row, int64_t rows, int64_t begin, int64_t n) {
  check_form("dequantize_affine", weight.bits, weight.group_size);
  if (row < 0 || rows < 0 || row > weight.rows - rows || begin < 0 || n < 0 ||
      begin > weight.cols - n) {
    throw Error("dequantize_affine",
                fmt::format("rows [{}, {}), columns [{}, {}) of a matrix [{}, {}]", row, row + rows,
                            begin, begin + n, weight.rows, weight.cols));
  }
}

}  // namespace

const AffinePath kAffineScalar = {decode_4, decode_8};
const AffineEncoder kAffineEncodeScalar = {range, encode};

AffineGrid affine_grid(int bits, AffineMode mode, float least, float most) {
  const auto top = static_cast<float>((1 << bits) - 1);
  if (mode == AffineMode::symmetric) {
    most = std::max(-least, most);
    least = -most;
  }
  float scale = (most - least) / top;
  if (scale == 0.0f) {
    scale = 1.0f;
  }
  if (mode == AffineMode::symmetric) {
    return {scale, 1 << (bits - 1)};
  }
  return {scale, static_cast<int32_t>(std::clamp(std::nearbyint(-least / scale), 0.0f, top))};
}

void pack_affine_codes(int bits, const uint8_t* src, int64_t n, uint8_t* codes) {
  check_form("pack_affine_codes", bits, 1);
  if (bits == 8) {
    std::copy_n(src, n, codes);
    return;
  }
  for (int64_t i = 0; i < n; i += 2) {
    const int high = i + 1 < n ? src[i + 1] & 15 : 0;
    codes[i / 2] = static_cast<uint8_t>((src[i] & 15) | high << 4);
  }
}

void unpack_affine_codes(int bits, const uint8_t* codes, int64_t n, uint8_t* dst) {
  check_form("unpack_affine_codes", bits, 1);
  if (bits == 8) {
    std::copy_n(codes, n, dst);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    dst[i] = static_cast<uint8_t>((i & 1) == 0 ? codes[i / 2] & 15 : codes[i / 2] >> 4);
  }
}

QuantizeStatus quantize_affine_row(int bits, AffineMode mode, const float* src, int64_t cols,
                                   int64_t group_size, uint8_t* codes, float* scales,
                                   uint8_t* zero_points) {
  check_form("quantize_affine_row", bits, group_size);
  // An even piece, so that each starts at a whole byte; codes that await the rest of their byte
  // stay in the buffer.
  constexpr int64_t kChunk = 1024;
  uint8_t unpacked[kChunk];
  int64_t held = 0;
  for (int64_t begin = 0; begin < cols; begin += group_size) {
    const int64_t end = std::min(begin + group_size, cols);
    float least = 0.0f;
    float most = 0.0f;
    if (!encoder().range(src + begin, end - begin, &least, &most)) {
      const float* bad =
          std::find_if(src + begin, src + end, [](float v) { return !std::isfinite(v); });
      return {Fault::not_finite, bad - src};
    }
    const AffineGrid grid = affine_grid(bits, mode, least, most);
    if (!std::isfinite(grid.scale)) {
      return {Fault::out_of_range, begin};
    }
    *scales++ = grid.scale;
    *zero_points++ = static_cast<uint8_t>(grid.zero);
    for (int64_t i = begin; i < end;) {
      const int64_t here = std::min(end - i, kChunk - held);
      encoder().encode(src + i, here, grid.scale, grid.zero, (1 << bits) - 1, unpacked + held);
      held += here;
      i += here;
      if (held == kChunk || i == cols) {
        pack_affine_codes(bits, unpacked, held, codes);
        codes += affine_row_bytes(bits, held);
        held = 0;
      }
    }
  }
  return {};
}

void dequantize_affine_tile(const AffineView& weight, int64_t row, int64_t rows, int64_t begin,
                            int64_t n, float* dst, int64_t stride) {
  check_piece(weight, row, rows, begin, n);
  const int64_t row_size = affine_row_bytes(weight.bits, weight.cols);
  const int64_t groups = affine_groups(weight.cols, weight.group_size);
  const int64_t first_group = begin / weight.group_size;
  const auto decode = weight.bits == 4 ? path().decode_4 : path().decode_8;
  for (int64_t r = row; r < row + rows; ++r, dst += stride) {
    const uint8_t* codes = weight.codes + r * row_size;
    int64_t entry = r * groups + first_group;
    int64_t group_end = (first_group + 1) * weight.group_size;
    for (int64_t column = begin; column < begin + n; ++entry, group_end += weight.group_size) {
      const int64_t here = std::min(begin + n, group_end) - column;
      const float zero = weight.zeros != nullptr ? weight.zeros[entry]
                                                 : static_cast<float>(weight.zero_points[entry]);
      decode(codes, column, here, weight.scales[entry], zero, dst + (column - begin));
      column += here;
    }
  }
}

void dequantize_affine_row(const AffineView& weight, int64_t row, int64_t begin, int64_t n,
                           FloatType out, void* dst) {
  if (out == FloatType::fp32) {
    return dequantize_affine_tile(weight, row, 1, begin, n, static_cast<float*>(dst), 0);
  }
  check_piece(weight, row, 1, begin, n);
  constexpr int64_t kChunk = 1024;
  float values[kChunk];
  auto* bytes = static_cast<char*>(dst);
  for (int64_t done = 0; done < n; done += kChunk) {
    const int64_t here = std::min(n - done, kChunk);
    dequantize_affine_tile(weight, row, 1, begin + done, here, values, 0);
    fp32_to(out, values, bytes + done * float_bytes(out), here);
  }
}

void dequantize_affine(const AffineView& weight, int64_t begin, int64_t end, FloatType out,
                       void* dst) {
  const int64_t row_size = weight.cols * float_bytes(out);
  for (int64_t row = begin; row < end; ++row) {
    dequantize_affine_row(weight, row, 0, weight.cols, out,
                          static_cast<char*>(dst) + (row - begin) * row_size);
  }
}

}  // namespace budwood::quant::kernels
