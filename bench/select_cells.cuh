// Rows that selections are timed on, in memory, and their lists against the CPU's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "cuda_harness.cuh"
#include "select_rows.cuh"
#include "specattn/cpu/select.hpp"
#include "specattn/cuda/select.cuh"

namespace bench {

using device = specattn::cuda;  // ::cuda is the toolkit's

struct cell {
  std::ptrdiff_t rows;
  std::ptrdiff_t length;
  double goal_us;  ///< 0: none
  std::ptrdiff_t group_rows = 1;
  std::ptrdiff_t groups() const { return rows / group_rows; }
};
/// Rows of a cell in memory, and where their lists go.
template <specattn::storage T>
struct device_rows {
  specattn::buffer<T, device> weights;
  specattn::selection<device> lists;
  device_rows(const cell& c, row_kind kind, std::uint32_t seed, const file_rows& real, const float* real_weights,
              cudaStream_t stream)
      : weights(static_cast<std::size_t>(c.rows * c.length)), lists(c.groups(), c.length) {
    fill_rows<<<static_cast<unsigned>(c.rows), 256, 0, stream>>>(weights.data(), static_cast<std::int32_t>(c.length),
                                                                 kind, seed, real_weights, real.rows);
    check(cudaGetLastError());
  }
  void select(specattn::context<device>& ctx, const cell& c, const specattn::selection_rule& rule) {
    specattn::weight_rows<T, device> from;
    from.weights = weights.shaped({c.groups(), c.group_rows, c.length});
    auto out = lists.view();
    out.mass = {};
    specattn::select(ctx, from, rule, out);
  }
};

/// Eight groups or fewer, evenly spaced, on the host: they are what gets compared.
template <specattn::storage T>
struct checked_rows {
  std::vector<std::ptrdiff_t> which;
  std::vector<T> weights;  ///< [which, group_rows, length]

  checked_rows(const device_rows<T>& got, const cell& c) {
    const std::ptrdiff_t count = (std::min)(c.groups(), std::ptrdiff_t{8});
    const std::ptrdiff_t each = c.group_rows * c.length;
    weights.resize(static_cast<std::size_t>(count * each));
    for (std::ptrdiff_t i = 0; i < count; ++i) {
      which.push_back(i * (c.groups() - 1) / (std::max)(count - 1, std::ptrdiff_t{1}));
      check(cudaMemcpy(weights.data() + i * each, got.weights.data() + which.back() * each,
                       static_cast<std::size_t>(each) * sizeof(T), cudaMemcpyDeviceToHost));
    }
  }
};

/// Our lists against the CPU's. Returns the share of positions kept, of all groups.
template <specattn::storage T>
double validated(const device_rows<T>& got, const cell& c, checked_rows<T>& rows,
                 const specattn::selection_rule& rule) {
  const auto checked = static_cast<std::ptrdiff_t>(rows.which.size());
  const auto lists = got.lists.view();
  std::vector<std::int32_t> counts(static_cast<std::size_t>(c.groups()));
  check(cudaMemcpy(counts.data(), lists.counts.data(), counts.size() * 4, cudaMemcpyDeviceToHost));
  specattn::context<specattn::cpu> ctx;
  specattn::selection<specattn::cpu> want(checked, c.length);
  specattn::weight_rows<T> from;
  from.weights = {rows.weights.data(), {checked, c.group_rows, c.length}};
  ctx.reserve_workspace(specattn::select_workspace_bytes(ctx, checked, c.group_rows, c.length, rule));
  specattn::select(ctx, from, rule, want.view());
  for (std::ptrdiff_t i = 0; i < checked; ++i) {
    const std::ptrdiff_t row = rows.which[static_cast<std::size_t>(i)];
    const std::int32_t count = want.view().counts[i];
    std::vector<std::int32_t> positions(static_cast<std::size_t>(count));
    check(cudaMemcpy(positions.data(), &lists.positions(row, 0), positions.size() * 4, cudaMemcpyDeviceToHost));
    if (counts[static_cast<std::size_t>(row)] != count ||
        std::memcmp(&want.view().positions(i, 0), positions.data(), positions.size() * 4) != 0) {
      std::fprintf(stderr, "group %td of %td x %td: %d positions, the CPU keeps %d or others\n", row, c.groups(),
                   c.length, counts[static_cast<std::size_t>(row)], count);
      std::exit(1);
    }
  }
  return std::accumulate(counts.begin(), counts.end(), 0.0) / static_cast<double>(c.groups() * c.length);
}

}  // namespace bench
