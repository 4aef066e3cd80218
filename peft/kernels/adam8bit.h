#pragma once

#include <array>
#include <cstdint>

/// AdamW whose moments are kept in a byte each (arXiv 2110.02861): codes of a dynamic map, with the
/// largest magnitude of each block of elements.
namespace budwood::kernels {

/// The 256 numbers of the dynamic map, rising: in each decade below 1 evenly spaced ones, twice as
/// many as in the decade below; with 0 and 1. The signed map serves first moments, the unsigned one
/// second moments.
const std::array<float, 256>& dynamic_map(bool with_sign);

/// One step's numbers.
struct Adam8bitStep {
  float beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f;
  float rate = 0;         ///< learning rate over 1 - beta1^t
  float correction2 = 1;  ///< square root of 1 - beta2^t
  float decay = 1;        ///< what the parameters are multiplied by first
};

/// A moment of one tensor.
struct CodedMoment {
  uint8_t* codes = nullptr;
  float* scales = nullptr;  ///< one for each block
};

constexpr int64_t kLargestAdamBlock = 4096;

/// Updates elements [begin, begin + n) of p with gradients g, all of whole blocks but for the last;
/// `begin` is a multiple of block <= kLargestAdamBlock. Codes are nearest ones, but a positive
/// second moment never becomes 0: an element that rarely has a gradient would jump by it.
void adamw_8bit(const Adam8bitStep& step, int64_t block, int64_t begin, int64_t n, float* p,
                const float* g, CodedMoment first, CodedMoment second);

/// Codes and scales of n numbers and back, in the same blocks.
void encode_moment(bool with_sign, int64_t block, const float* values, int64_t n,
                   CodedMoment moment);
void decode_moment(bool with_sign, int64_t block, CodedMoment moment, int64_t n, float* values);

}  // namespace budwood::kernels
