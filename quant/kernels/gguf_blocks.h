#pragma once

#include <budwood/quant/kernels/ggml_type.h>
#include <budwood/quant/kernels/quantize_status.h>

#include <cstdint>

/// The block formats of GGUF files: rows of small blocks, each with its own fp16 scale.
///
/// Element order, with q the unsigned code (fp16 and integer parts are widened to fp32 first; every
/// product and sum is rounded to fp32, none is fused):
///   q4_0  18 bytes: d, qs[16]                    (q - 8) * d; low nibbles are elements 0..15
///   q4_1  20 bytes: d, m, qs[16]                 q * d + m
///   q5_0  22 bytes: d, qh u32, qs[16]            (q - 16) * d; bit j of qh is bit 4 of element j
///   q5_1  24 bytes: d, m, qh u32, qs[16]         q * d + m
///   q8_0  34 bytes: d, qs i8[32]                 q * d
///   q4_k 144 bytes: d, dmin, s[12], qs[128]      (d * sc) * q - (dmin * mn), 8 sub-blocks of 32
///   q5_k 176 bytes: d, dmin, s[12], qh[32], qs[128]   the same with 5-bit codes
///   q6_k 210 bytes: ql[128], qh[64], sc i8[16], d     (d * sc) * (q - 32), 16 sub-blocks of 16
/// Values equal those of ggml's C code and of the gguf Python package, bit for bit.
namespace budwood::quant::kernels {

/// Bytes of n elements. Throws Error for a type that cannot be decoded, and when n is negative or
/// no multiple of the block.
int64_t row_bytes(GgmlType type, int64_t n);

/// Decodes n elements (a multiple of the block) from src to dst; src needs no alignment.
void dequantize_row(GgmlType type, const void* src, float* dst, int64_t n);

/// The same for `rows` rows of n elements, src_stride bytes and dst_stride floats apart.
void dequantize_rows(GgmlType type, const void* src, int64_t src_stride, int64_t rows, float* dst,
                     int64_t dst_stride, int64_t n);

/// Encodes n elements (a multiple of the block) into dst, row_bytes(type, n) long, with the bytes
/// of ggml's reference quantisers. Throws Error for a type that cannot be written; faults of the
/// data (NaN, infinity, a scale beyond fp16, where ggml would store infinity) are returned. A block
/// whose scale is so small that its inverse overflows decodes to zeros.
QuantizeStatus quantize_row(GgmlType type, const float* src, void* dst, int64_t n);

}  // namespace budwood::quant::kernels
