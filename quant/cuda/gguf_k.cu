#include <budwood/quant/cuda/rows_kernels.cuh>

using budwood::quant::kernels::GgmlType;
using budwood::quant::kernels::GgufRows;

BUDWOOD_INSTANTIATE_ROWS(GgufRows<GgmlType::q4_k>)
BUDWOOD_INSTANTIATE_ROWS(GgufRows<GgmlType::q5_k>)
BUDWOOD_INSTANTIATE_ROWS(GgufRows<GgmlType::q6_k>)
