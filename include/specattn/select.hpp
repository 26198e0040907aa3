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

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_DATA {

/// How the rows of a group (draft steps × heads, or whatever the caller groups) become one list.
///
/// A position's share of a row is its weight over the row's mass on [0, kv_len), in units of 2^-48: rows are scaled to
/// unit mass, whatever they sum to. A row without mass has no shares and adds nothing. With one row the three agree.
enum class combine {
  unite,  ///< select from each row by its weights, keep the union
  mean,   ///< weigh a position by the sum of its shares, then select once
  max,    ///< weigh a position by its largest share, then select once
};

enum class threshold_method {
  exact,      ///< the least set whose mass reaches p, ties by smaller position
  bisection,  ///< the paper's: ten halvings of [0, max]; keeps every weight >= the last threshold that held p. A
              ///< superset of the exact set: what it keeps beyond is within max/1024 of the exact set's lightest
};

/// What a list holds.
enum class emit { positions, pages };

/// The default keeps 95 % of the mass, four sinks and the 16 newest positions.
struct selection_rule {
  float top_p = 0.95f;  ///< share of the row's mass; <= 0 keeps forced positions only, >= 1 every position
  std::int32_t max_tokens = (std::numeric_limits<std::int32_t>::max)();  ///< cap on a list, forced positions included
  std::int32_t sinks = 4;                                                ///< the first positions, always kept
  std::int32_t recent = 16;    ///< the last positions of the prefix, always kept
  std::int32_t page_size = 1;  ///< > 1: whole pages are kept; a page weighs the sum of its positions
  combine rows = combine::unite;
  threshold_method method = threshold_method::exact;
  emit output = emit::positions;  ///< pages: page numbers, for a block table
};

}  // namespace specattn::inline SPECATTN_DATA

namespace specattn::inline SPECATTN_CODE {

/// Weights to select from. Non-negative; they need not sum to one (mass is relative to the row's own sum).
template <storage T, backend B = cpu>
struct weight_rows {
  static_assert(!scaled_storage<T>,
                "weights have no scale that 8 bits could be multiples of: use float, bf16 or fp16");
  view<const T, 3, B> weights;             ///< [groups, rows, kv_len] any strides
  view<const std::int32_t, 1, B> kv_lens;  ///< [groups] valid positions of each group; empty: all
  view<const float, 1, B> top_p;           ///< [groups] in place of the rule's; empty: the rule's
};

namespace detail {
/// The backend's implementation.  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
template <backend B>
struct select_impl;

template <storage T, backend B>
void check_select(const weight_rows<T, B>& from, const selection_rule& rule, const selection_view<B>& out) {
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
  expects(from.weights.extent(2) <= select_max_kv_len && from.weights.extent(1) <= select_max_rows,
          "select: ", from.weights.extent(1), " rows of ", from.weights.extent(2), " positions exceed the limits of ",
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
/// The set. Forced positions (sinks, recent) are kept whatever they weigh. Of the others, heaviest first and ties by
/// smaller position, as few as make the kept mass reach top_p times the row's mass; forced positions count towards
/// it. The mass is that over [0, kv_len) alone; nothing after kv_len is read.
///   top_p <= 0     the forced positions          top_p >= 1   every position, zeros included
///   top_p is NaN   the forced positions, flagged selection_invalid_rule
///   no mass        the forced positions (unless top_p >= 1)
/// NaN, infinite and negative weights count as zero and raise selection_invalid_weight; -0 is zero.
///
/// The cap. A list over max_tokens (or over the capacity) keeps the first of it in this order: forced before others,
/// heavier before lighter, smaller before larger; so forced positions go last, the lightest of them first. A union of
/// several rows is ordered by the sum of shares. The group is flagged selection_capped.
///
/// Pages. A page weighs the sum of its positions, is kept or left as a whole, and is forced if one of its positions
/// is. The cap then admits max_tokens / page_size pages, a partial last page counting as a whole one, unless
/// max_tokens >= kv_len.
///
/// `out.mass` is the kept share: of the row with one row, of the sum (or, under max, the maximum) of shares with
/// several; 1 where there is no mass. Lists are padded as selection_view says. kv_len 0 gives an empty list.
///
/// Exact: weights are ordered by their bits and mass is counted in integers (2^-40 of the power of two at or below
/// the row's maximum), so sets, counts, masses and flags are the same on both backends, for any number of threads and
/// any grid. Weights below 2^-41 of that have no mass: only top_p >= 1 and bisection ever keep them.
///
/// \pre    `out.capacity()` holds the longest list: min(kv_len, max_tokens), or pages of it; a shorter one caps
/// \throws contract_error for groups that differ, no rows, more than 2^22 positions or 2^14 rows, a negative or
///         meaningless rule, a workspace below select_workspace_bytes()
/// \cost   reads every weight once from memory; O(groups × rows × kv_len) for any weights. cpu: a group is one
///         thread's work
/// \sync   cpu: done on return. cuda: queued on the context's stream
template <storage T, backend B>
void select(context<B>& ctx, const weight_rows<T, B>& from, const selection_rule& rule, selection_view<B> out) {
  detail::check_select(from, rule, out);
  detail::select_impl<B>::run(ctx, from, rule,
                              out);  // incomplete? include <specattn/specattn.hpp> or <specattn/cuda.cuh>
}

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
