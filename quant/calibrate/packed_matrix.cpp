#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <budwood/quant/calibrate/packed_matrix.h>
#include <algorithm>

namespace budwood::quant::calibrate {

void PackedMatrix::set_grids(int64_t first_row, const at::Tensor& rows, int64_t size,
                             const at::Tensor& importance) {
  const auto* weights = importance.const_data_ptr<double>();
  const auto* values = rows.const_data_ptr<double>();
  const int64_t in = rows.size(1), groups = (in + size - 1) / size;
  at::parallel_for(0, rows.size(0), 8, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r)
      for (int64_t g = 0; g < groups; ++g)
        set_grid(first_row + r, g, values + r * in + g * size, std::min(size, in - g * size),
                 weights + g * size);
  });
}

}  // namespace budwood::quant::calibrate
