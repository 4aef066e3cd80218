#pragma once

/// In which arithmetic tokens in bf16 are multiplied.
namespace budwood::quant::kernels {

/// True for bf16 products with fp32 sums, false for fp32: bf16 where the processor has it
/// (has_avx512_bf16(), has_amx_bf16()) and is faster at it than at fp32, which is measured once;
/// some are at half the rate. The environment variable BUDWOOD_BF16=fp32|bf16 decides instead;
/// throws Error for another value, and for bf16 on a processor that lacks it.
bool multiplies_in_bf16();

/// Decides while it lives, for the whole process. Throws Error for true on a processor that lacks
/// bf16. Not for use while kernels run in other threads.
class ScopedBf16 {
 public:
  explicit ScopedBf16(bool bf16);
  ~ScopedBf16();
  ScopedBf16(const ScopedBf16&) = delete;
  ScopedBf16& operator=(const ScopedBf16&) = delete;

 private:
  int previous_;
};

}  // namespace budwood::quant::kernels
