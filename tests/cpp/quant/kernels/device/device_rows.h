#pragma once

#include <budwood/quant/kernels/device/rows_device.h>

#include <string>

#include "../test_data.h"

/// The kernels of quant/cuda, their threads run one after the other on the host.
namespace budwood::quant::kernels {

/// Opens a copy of w as a kernel does and calls use(copy).
template <class Rows, class Use>
bool with_opened(Rows w, const Use& use) {
  float table[16] = {};
  if constexpr (Rows::kTableSize > 0) {
    for (int i = 0; i < Rows::kTableSize; ++i) {
      table[i] = w.table_entry(i);
    }
    w.table = table;
  }
  if (!w.open()) {
    return false;
  }
  use(w);
  return true;
}

/// Rows ids[i], or begin + i where ids is null, to dst [count, cols].
template <class Rows>
bool decode_on_host(const Rows& w, int64_t begin, int64_t count, const int64_t* ids,
                    const Floats& dst) {
  return with_opened(w, [&](const Rows& opened) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t run = 0; run < runs_of(opened.cols); ++run) {
        decode_run(opened, ids != nullptr ? ids[i] : begin + i, run, dst, i);
      }
    }
  });
}

/// x [tokens, cols] times Wᵀ to y [tokens, rows]; 32 lanes, summed as their shuffles sum.
template <class Rows>
bool multiply_on_host(const Rows& w, const ConstFloats& x, int tokens, const Floats& y) {
  return with_opened(w, [&](const Rows& opened) {
    for (int64_t row = 0; row < opened.rows; ++row) {
      float lanes[32][kFewTokens] = {};
      for (int lane = 0; lane < 32; ++lane) {
        multiply_lane<kFewTokens>(opened, row, lane, 32, x, tokens, lanes[lane]);
      }
      for (int m = 0; m < tokens; ++m) {
        for (int step = 16; step > 0; step /= 2) {
          for (int lane = 0; lane < step; ++lane) {
            lanes[lane][m] += lanes[lane + step][m];
          }
        }
        y.set(m * opened.rows + row, lanes[0][m]);
      }
    }
  });
}

/// What the kernel of quantize_bnb4 does; the first element that is not finite, or -1.
inline int64_t encode_on_host(const Bnb4Source& source, uint8_t* codes, float* absmax) {
  float thresholds[15];
  for (int i = 0; i < 15; ++i) {
    thresholds[i] = bnb4_threshold(source.type, i);
  }
  int64_t bad = -1;
  for (int64_t block = 0; block < bnb4_blocks(source.count, source.block_size); ++block) {
    uint32_t most = 0;
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t bits = bnb4_largest_bits(source, block, lane, 32);
      most = bits > most ? bits : most;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (most >= 0x7f800000u) {
        const int64_t first = bnb4_first_not_finite(source, block, lane, 32);
        bad = first >= 0 && (bad < 0 || first < bad) ? first : bad;
      } else {
        absmax[block] = bnb4_encode(source, thresholds, block, most, lane, 32, codes);
      }
    }
  }
  return bad;
}

}  // namespace budwood::quant::kernels
