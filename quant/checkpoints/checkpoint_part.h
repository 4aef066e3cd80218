#pragma once

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/quant/error.h>

/// Checks of a checkpoint's tensors; for the sources beside this file only.
namespace budwood::quant {

/// The tensor, contiguous; throws unless it has the shape and is int32 (or, with `floating`, of a
/// floating type).
inline at::Tensor checkpoint_part(const char* where, const char* name, const at::Tensor& t,
                                  at::IntArrayRef shape, bool floating = false) {
  const bool typed = floating ? at::isFloatingType(t.scalar_type()) : t.scalar_type() == at::kInt;
  if (!typed || t.sizes() != shape || !t.is_cpu())
    throw Error(where, fmt::format("{} is {} [{}] on {}; wanted {} [{}] on the cpu", name,
                                   c10::toString(t.scalar_type()), fmt::join(t.sizes(), ", "),
                                   t.device().str(), floating ? "floating point" : "Int",
                                   fmt::join(shape, ", ")));
  return t.detach().contiguous();
}

/// scales [groups, out] of a checkpoint as [out, groups] fp32.
inline at::Tensor checkpoint_scales(const char* where, const at::Tensor& scales, int64_t groups,
                                    int64_t out) {
  auto rows = checkpoint_part(where, "scales", scales, {groups, out}, /*floating=*/true)
                  .t()
                  .to(at::kFloat)
                  .contiguous();
  if (!rows.isfinite().all().item<bool>())
    throw Error(where, "scales holds values that are not finite");
  return rows;
}

}  // namespace budwood::quant
