#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <budwood/quant/calibrate/affine_matrix.h>
#include <budwood/quant/calibrate/gptq.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <cmath>
#include <memory>

namespace budwood::quant::calibrate {
namespace {

// Rows are independent of each other: this many are worked on at a time, in fp64.
constexpr int64_t kPanelRows = 512;

void check(const at::Tensor& w, const at::Tensor& hessian, const GptqOptions& options) {
  check_matrix("gptq", w, options.bits);
  const bool affine = options.format == "affine";
  if (!affine && options.format != "nf4" && options.format != "fp4")
    throw Error("gptq", fmt::format("format '{}'; wanted affine, nf4 or fp4", options.format));
  if (affine ? options.double_quant : options.symmetric || options.bits != 4)
    throw Error("gptq", affine ? "double_quant is for nf4 and fp4"
                               : "nf4 and fp4 have 4 bits and no symmetric grid of their own");
  if (!affine && !options.static_groups && (options.act_order || options.double_quant))
    throw Error("gptq", fmt::format("{} with act_order or double_quant asks for static_groups",
                                    options.format));
  if (hessian.dim() != 2 || hessian.size(0) != w.size(1) || hessian.size(1) != w.size(1))
    throw Error("gptq", fmt::format("the Hessian of a weight [{}] is [{}, {}], found [{}]",
                                    fmt::join(w.sizes(), ", "), w.size(1), w.size(1),
                                    fmt::join(hessian.sizes(), ", ")));
  if (!hessian.isfinite().all().item<bool>())
    throw Error("gptq", "the Hessian holds values that are not finite");
  if (!(options.damping >= 0) || options.block < 1)
    throw Error("gptq", fmt::format("damping {} and block {}; wanted 0 or more and 1 or more",
                                    options.damping, options.block));
}

// U with H⁻¹ = Uᵀ U, upper triangular: with R Rᵀ = H and R upper triangular, U = R⁻¹; R comes from
// the Cholesky factor of H with both axes reversed.
at::Tensor inverse_factor(const at::Tensor& hessian, double damping) {
  const auto [factor, info] = at::linalg_cholesky_ex(hessian.flip({0, 1}));
  if (info.item<int64_t>() != 0)
    throw Error("gptq",
                fmt::format("the Hessian is not positive definite with damping {}: take more "
                            "damping or more calibration tokens",
                            damping));
  const auto r = factor.flip({0, 1});
  return at::linalg_solve_triangular(r, at::eye(r.size(0), r.options()), /*upper=*/true)
      .contiguous();
}

// The group of each column, in the order of work.
std::vector<int64_t> groups_in_order(const std::vector<int64_t>& columns, int64_t size,
                                     bool by_column) {
  std::vector<int64_t> group;
  for (size_t p = 0; p < columns.size(); ++p)
    group.push_back((by_column ? columns[p] : static_cast<int64_t>(p)) / size);
  return group;
}

// Where the block that starts at `begin` ends: a group whose scale is taken on the way lies within
// it or starts another, so that it is seen with all updates whatever the block size.
int64_t block_end(int64_t begin, int64_t in, int64_t block, int64_t size, bool keep_groups) {
  const int64_t end = std::min(in, begin + block);
  if (!keep_groups) return end;
  const int64_t last_start = (end - 1) / size * size;
  return last_start > begin && std::min(in, last_start + size) > end ? last_start : end;
}

struct Plan {
  GptqOptions options;
  std::vector<int64_t> columns;  // the column that stands at each place
  std::vector<int64_t> group;    // the group at each place
  int64_t size;                  // of a group
  bool as_worked;                // columns are stored in the order of work
  at::Tensor factor;             // U, in the order of work
  at::Tensor importance = {};    // of the columns' errors, in the order of work
};

std::unique_ptr<PackedMatrix> packed_matrix(const GptqOptions& options, int64_t out, int64_t in,
                                            int64_t size) {
  if (options.format == "affine")
    return std::make_unique<AffineMatrix>(out, in, options.bits, size, options.symmetric);
  return float4_matrix(options.format, out, in, size, options.double_quant);
}

// Rounds a panel of rows [n, in], fp64, in the order of work.
void solve(const Plan& plan, at::Tensor& rows, int64_t first, PackedMatrix& result) {
  const int64_t n = rows.size(0), in = rows.size(1);
  const bool on_the_way = !plan.options.static_groups;
  const auto* u = plan.factor.const_data_ptr<double>();
  const auto* importance = plan.importance.const_data_ptr<double>();
  auto* w = rows.mutable_data_ptr<double>();
  for (int64_t begin = 0; begin < in;) {
    const int64_t end = block_end(begin, in, plan.options.block, plan.size, on_the_way);
    auto errors = at::empty({n, end - begin}, rows.options());
    auto* e = errors.mutable_data_ptr<double>();
    at::parallel_for(0, n, 8, [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) {
        double* row = w + r * in;
        for (int64_t j = begin; j < end; ++j) {
          const int64_t g = plan.group[static_cast<size_t>(j)];
          if (on_the_way && j % plan.size == 0)
            result.set_grid(first + r, g, row + j, std::min(plan.size, in - j), importance + j);
          const int64_t stored = plan.as_worked ? j : plan.columns[static_cast<size_t>(j)];
          const double value = result.round(first + r, stored, g, row[j]);
          const double error = (row[j] - value) / u[j * in + j];
          for (int64_t k = j + 1; k < end; ++k) row[k] -= error * u[j * in + k];
          e[r * (end - begin) + j - begin] = error;
        }
      }
    });
    if (end < in)
      rows.narrow(1, end, in - end)
          .addmm_(errors, plan.factor.narrow(0, begin, end - begin).narrow(1, end, in - end), 1.0,
                  -1.0);
    begin = end;
  }
}

}  // namespace

Weight gptq(const at::Tensor& w, const at::Tensor& hessian, const GptqOptions& options) {
  check(w, hessian, options);
  at::NoGradGuard no_grad;
  const int64_t out = w.size(0), in = w.size(1);
  auto h = hessian.to(at::kDouble).clone();
  auto diagonal = h.diagonal();
  const auto dead = diagonal == 0;
  diagonal.masked_fill_(dead, 1.0);
  const auto order = options.act_order
                         ? std::get<1>(at::sort(diagonal, /*stable=*/true, 0, /*descending=*/true))
                         : at::arange(in, at::kLong);
  diagonal.add_(options.damping * diagonal.mean());
  if (options.act_order) h = h.index_select(0, order).index_select(1, order);

  const int64_t size = group_columns("gptq", options.group_size, in);
  const bool as_worked = options.act_order && !options.static_groups && size < in;
  Plan plan{options, {}, {}, size, as_worked, inverse_factor(h, options.damping)};
  const auto* place = order.const_data_ptr<int64_t>();
  plan.columns.assign(place, place + in);
  plan.group = groups_in_order(plan.columns, plan.size, options.static_groups);

  // What a column's rounding costs once the columns behind it took up their part of it.
  plan.importance = plan.factor.diagonal().square().reciprocal().contiguous();
  const auto by_column = plan.importance.index_select(0, at::argsort(order)).contiguous();
  const auto result = packed_matrix(options, out, in, size);
  const auto panel = [&](int64_t first) {
    return w.detach()
        .narrow(0, first, std::min(kPanelRows, out - first))
        .to(at::kDouble)
        .masked_fill(dead, 0.0)
        .contiguous();
  };
  if (options.static_groups) {
    for (int64_t first = 0; first < out; first += kPanelRows)
      result->set_grids(first, panel(first), size, by_column);
    result->grids_done();
  }
  for (int64_t first = 0; first < out; first += kPanelRows) {
    auto rows = panel(first);
    if (options.act_order) rows = rows.index_select(1, order);
    solve(plan, rows, first, *result);
  }
  auto weight = result->weight();
  if (plan.as_worked) weight.parts.push_back(order.to(at::kInt));
  return weight;
}

}  // namespace budwood::quant::calibrate
