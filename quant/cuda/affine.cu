#include <budwood/quant/cuda/rows_kernels.cuh>

BUDWOOD_INSTANTIATE_ROWS(budwood::quant::kernels::AffineRows<4>)
BUDWOOD_INSTANTIATE_ROWS(budwood::quant::kernels::AffineRows<8>)
BUDWOOD_INSTANTIATE_ROWS(budwood::quant::kernels::Int8Rows)
