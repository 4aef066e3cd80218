#pragma once

#include <budwood/quant/kernels/half.h>
#include <budwood/quant/kernels/quantize_status.h>

#include <cstdint>

/// LLM.int8 weights (arXiv 2208.07339): one scale per row, SCB = max |row|, codes -127..127.
namespace budwood::quant::kernels {

/// One row of n floats: scb = max |w|, q = round-half-even(fp32(w * fp32(127 / scb))). A row of
/// zeros has scb 0 and codes 0. NaN and infinity are faults.
QuantizeStatus quantize_int8_row(const float* src, int64_t n, int8_t* codes, float* scb);

/// n codes of one row: fp32(fp32(q * scb) * fp32(1/127)), then one rounding to the output type.
void dequantize_int8_row(const int8_t* codes, float scb, int64_t n, FloatType out, void* dst);

}  // namespace budwood::quant::kernels
