#pragma once

#include <budwood/quant/kernels/device/rows_device.h>
#include <budwood/quant/weight.h>

namespace budwood::quant {

/// A packed weight as the kernels of its device see it. Pointers are valid while its parts live;
/// sizes that only the device knows are checked there. Throws Error for a dense weight.
kernels::AnyRows device_rows(const Weight& w);

/// Block size of an nf4 or fp4 weight of `count` elements with so many scales; when it has one
/// scale, any that holds all elements. Throws Error when none gives so many.
int64_t bnb4_block_size(int64_t count, int64_t scales);

}  // namespace budwood::quant
