#pragma once

#include <budwood/quant/kernels/half.h>
#include <budwood/quant/kernels/quantize_status.h>

#include <cstdint>

/// NF4 and FP4 in the storage of bitsandbytes, to its CPU path's bits.
///
/// A weight is flat, row-major. Blocks of block_size consecutive elements, which may cross rows,
/// share one fp32 absmax; the last block may be short. codes: byte i holds element 2i in its high
/// nibble and 2i + 1 in its low one; an odd count is padded with the code of zero.
/// Element = fp32(table[code] * absmax), then one rounding to the output type.
/// QLoRA, arXiv 2305.14314.
namespace budwood::quant::kernels {

enum class Bnb4Type { nf4, fp4 };

/// The 16 values of a type, indexed by code. FP4's order is sign bit, then no order by size.
const float* bnb4_table(Bnb4Type type);

/// Powers of two, 32 to 4096.
bool is_bnb4_block_size(int64_t block_size);

inline int64_t bnb4_bytes(int64_t n) {
  return (n + 1) / 2;
}
inline int64_t bnb4_blocks(int64_t n, int64_t block_size) {
  return (n + block_size - 1) / block_size;
}

/// n floats to codes [bnb4_bytes(n)] and absmax [bnb4_blocks(n, block_size)]. A long tensor may be
/// done in pieces that start at block boundaries. NaN and infinity are faults; Error for a block
/// size that is not allowed.
QuantizeStatus quantize_bnb4(Bnb4Type type, const float* src, int64_t n, int64_t block_size,
                             uint8_t* codes, float* absmax);

/// Absmax values that are themselves quantised to 8 bits ("double quantisation"):
/// absmax[b] = fp32(fp32(map[codes[b]] * absmax[b / block_size]) + offset).
struct NestedAbsmax {
  const uint8_t* codes = nullptr;  ///< [blocks]
  const float* map = nullptr;      ///< [256]
  const float* absmax = nullptr;   ///< [ceil(blocks / block_size)]
  float offset = 0.0f;
  int64_t block_size = 256;
};

/// The signed 8-bit map that bitsandbytes uses for it: 256 ascending values, 0 at 127, 1 at 255.
const float* dynamic_map();

/// blocks absmax values to codes [blocks] and nested [ceil(blocks / 256)], around an offset near
/// their mean (bitsandbytes takes torch's mean, whose last bits depend on the order of its sum). Of
/// two entries equally near the lower is taken. NaN and infinity are faults.
QuantizeStatus quantize_absmax(const float* absmax, int64_t blocks, float offset, uint8_t* codes,
                               float* nested);

/// Values [begin, begin + n) of a nested absmax.
void dequantize_absmax(const NestedAbsmax& nested, int64_t begin, int64_t n, float* dst);

/// A quantised weight where it lies. Either absmax or nested.codes is set.
struct Bnb4View {
  Bnb4Type type = Bnb4Type::nf4;
  const uint8_t* codes = nullptr;  ///< [bnb4_bytes(count)]
  const float* absmax = nullptr;   ///< [bnb4_blocks(count, block_size)], or null
  NestedAbsmax nested = {};        ///< read when absmax is null
  int64_t count = 0;               ///< elements
  int64_t block_size = 64;
};

/// Elements [begin, begin + n) of the flat weight to dst, n elements of out. begin may be anywhere,
/// inside a byte too. Error for a range beyond the weight or a block size that is not allowed.
void dequantize_bnb4(const Bnb4View& weight, int64_t begin, int64_t n, FloatType out, void* dst);

/// The same as fp32 for rows [row, row + rows) by columns [col, col + n) of a matrix with `cols`
/// columns; rows of dst are `stride` floats apart.
void dequantize_bnb4_tile(const Bnb4View& weight, int64_t cols, int64_t row, int64_t rows,
                          int64_t col, int64_t n, float* dst, int64_t stride);

/// out[r] = sum over i of element (row + r, col + i) * x[i], for four rows and n columns; the bits
/// of GemmPath::dot on decoded elements. False, and nothing done, where decoding first is as fast
/// or the blocks do not suit.
bool dot_bnb4(const Bnb4View& weight, int64_t cols, int64_t row, int64_t col, int64_t n,
              const float* x, float* out);

}  // namespace budwood::quant::kernels
