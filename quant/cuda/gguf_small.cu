#include <budwood/quant/cuda/rows_kernels.cuh>

using budwood::quant::kernels::GgmlType;
using budwood::quant::kernels::GgufRows;

BUDWOOD_INSTANTIATE_ROWS(GgufRows<GgmlType::q4_0>)
BUDWOOD_INSTANTIATE_ROWS(GgufRows<GgmlType::q4_1>)
BUDWOOD_INSTANTIATE_ROWS(GgufRows<GgmlType::q5_0>)
BUDWOOD_INSTANTIATE_ROWS(GgufRows<GgmlType::q5_1>)
BUDWOOD_INSTANTIATE_ROWS(GgufRows<GgmlType::q8_0>)
