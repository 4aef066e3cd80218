#include <ATen/ATen.h>

#include <budwood/peft/models/gguf_layout.h>

namespace budwood::models {
namespace {

at::Tensor swap_inside_heads(const at::Tensor& rows, int64_t heads, int64_t a, int64_t b) {
  return rows.reshape({heads, a, b, -1}).transpose(1, 2).reshape(rows.sizes());
}

}  // namespace

at::Tensor rows_from_gguf(const at::Tensor& rows, int64_t head_dim) {
  return swap_inside_heads(rows, rows.size(0) / head_dim, head_dim / 2, 2);
}

at::Tensor rows_to_gguf(const at::Tensor& rows, int64_t head_dim) {
  return swap_inside_heads(rows, rows.size(0) / head_dim, 2, head_dim / 2);
}

}  // namespace budwood::models
