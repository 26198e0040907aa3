// From importance to kept positions: the smallest set that holds a share p of the mass. No sort.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "backend.hpp"
#include "error.hpp"
#include "scalar.hpp"
#include "select_math.hpp"
#include "selection.hpp"
#include "view.hpp"

namespace specattn::inline v0_1 {

/// How the rows of a group (draft steps × heads, or whatever the caller groups) become one list.
enum class combine {
  unite,  ///< select from each row, keep the union
  mean,   ///< add the rows, each scaled to unit mass, then select once
  max,    ///< take the largest scaled weight of each position, then select once
};

enum class threshold_method {
  exact,      ///< the least set whose mass reaches p, ties by smaller position
  bisection,  ///< the paper's: ten halvings of [0, max]; keeps every weight >= the last threshold that held p
};

/// What a list holds.
enum class emit { positions, pages };

/// The default keeps 95 % of the mass, four sinks and the 16 newest positions.
struct selection_rule {
  float top_p = 0.95f;  ///< share of the row's mass; <= 0 keeps forced positions only, >= 1 every position
  std::int32_t max_tokens = std::numeric_limits<std::int32_t>::max();  ///< cap on a list, forced positions included
  std::int32_t sinks = 4;      ///< the first positions, always kept
  std::int32_t recent = 16;    ///< the last positions of the prefix, always kept
  std::int32_t page_size = 1;  ///< > 1: whole pages are kept; a page weighs the sum of its positions
  combine rows = combine::unite;
  threshold_method method = threshold_method::exact;
  emit output = emit::positions;  ///< pages: page numbers, for a block table
};

/// Weights to select from. Non-negative; they need not sum to one (mass is relative to the row's own sum).
template <storage T, backend B = cpu>
struct importance {
  view<const T, 3, B> weights;               ///< [groups, rows, kv_len] any strides
  view<const std::int32_t, 1, B> kv_lens;    ///< [groups] valid positions of each group; empty: all
  view<const float, 1, B> top_p;             ///< [groups] in place of the rule's; empty: the rule's
};

namespace detail {
/// The backend's implementation.  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
template <backend B>
struct select_impl;

template <storage T, backend B>
void check_select(const importance<T, B>& from, const selection_rule& rule, const selection_view<B>& out) {
  const auto groups = from.weights.extent(0);
  expects(out.groups() == groups && out.positions.extent(0) == groups, "select: importance has ", groups,
          " groups, the selection ", out.groups(), " counts and ", out.positions.extent(0), " lists");
  expects(from.kv_lens.empty() || from.kv_lens.extent(0) == groups, "select: ", from.kv_lens.extent(0),
          " kv_lens for ", groups, " groups");
  expects(from.top_p.empty() || from.top_p.extent(0) == groups, "select: ", from.top_p.extent(0), " top_p for ",
          groups, " groups");
  expects(groups == 0 || from.weights.extent(1) > 0, "select: ", groups, " groups of no rows");
  expects(rule.sinks >= 0 && rule.recent >= 0 && rule.max_tokens >= 0, "select: sinks ", rule.sinks, ", recent ",
          rule.recent, " and max_tokens ", rule.max_tokens, " must not be negative");
  expects(rule.page_size >= 1, "select: page_size ", rule.page_size, " must be at least 1");
  expects(rule.output == emit::positions || rule.page_size > 1, "select: page numbers need a page_size above 1");
  expects(from.weights.extent(2) <= select_max_kv_len && from.weights.extent(1) <= select_max_rows, "select: ",
          from.weights.extent(1), " rows of ", from.weights.extent(2), " positions exceed the limits of ",
          select_max_rows, " and ", select_max_kv_len);
  expects(out.mass.empty() || out.mass.extent(0) == groups, "select: ", out.mass.extent(0), " mass entries for ",
          groups, " groups");
  expects(out.status.empty() || out.status.extent(0) == groups, "select: ", out.status.extent(0),
          " status entries for ", groups, " groups");
}
}  // namespace detail

/// Bytes of workspace that select() takes from the context for `groups` × `rows` × `kv_len` or anything smaller.
template <backend B>
std::size_t select_workspace_bytes(const context<B>& ctx, std::ptrdiff_t groups, std::ptrdiff_t rows,
                                   std::ptrdiff_t kv_len, const selection_rule& rule) {
  return detail::select_impl<B>::workspace_bytes(ctx, groups, rows, kv_len, rule);
}

/// Writes to `out`, for every group, the kept positions of its rows under `rule`.
///
/// Exact: weights are ordered by their bits and mass is counted in 64-bit fixed point (2^-40 of the row's
/// maximum), so sets, counts and order are the same on both backends, for any number of threads and any grid.
/// Forced positions (sinks, recent) count towards the mass and the cap. NaN, infinite and negative weights count
/// as zero and raise selection_invalid_weight. A row of zeros keeps the forced positions only. top_p >= 1 keeps
/// every position, zeros included. A group with kv_len <= 0 gets an empty list.
///
/// \pre    `out.capacity()` holds the longest list: min(kv_len, max_tokens), or pages of it. A list that does not
///         fit is cut like one over max_tokens and flagged selection_capped.
/// \throws contract_error
/// \cost   reads every weight once from memory; O(groups × rows × kv_len)
/// \sync   cpu: done on return. cuda: queued on the context's stream.
template <storage T, backend B>
void select(context<B>& ctx, const importance<T, B>& from, const selection_rule& rule, selection_view<B> out) {
  detail::check_select(from, rule, out);
  detail::select_impl<B>::run(ctx, from, rule, out);
}

}  // namespace specattn::inline v0_1
