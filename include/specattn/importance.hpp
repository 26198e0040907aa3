// Importance from signals: for each target (layer, kv head), the weighted sum of the draft heads' rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "alignment.hpp"
#include "backend.hpp"
#include "error.hpp"
#include "selection.hpp"
#include "view.hpp"

namespace specattn::inline v0_1 {

/// The coefficients of an alignment without their zeros, in the order they are used.
struct sparse_mixture {
  struct term {
    std::int32_t signal;
    float coefficient;
  };
  std::vector<std::int32_t> first;  ///< [groups + 1] terms of group g are first[g] … first[g + 1] - 1
  std::vector<term> terms;
  std::int32_t kv_heads = 1;  ///< group g is (layer g / kv_heads, kv head g % kv_heads)
  signal_set signals;

  std::int32_t groups() const { return static_cast<std::int32_t>(first.size()) - 1; }
};

/// Drops terms below `least` and rescales the others of the group to a sum of one. At the default a sixth of a fitted
/// mixture's terms go, with 0.2 % of its sum.
inline sparse_mixture make_sparse_mixture(const alignment& from, float least = 2e-3f) {
  sparse_mixture mixture;
  mixture.signals = from.signals;
  mixture.kv_heads = from.target.kv_heads;
  const std::int32_t signals = from.signals.count();
  const auto groups = static_cast<std::int32_t>(from.coefficients.size()) / signals;
  mixture.first.push_back(0);
  for (std::int32_t g = 0; g < groups; ++g) {
    const float* row = from.coefficients.data() + std::ptrdiff_t{g} * signals;
    float sum = 0.0f;
    for (std::int32_t i = 0; i < signals; ++i) sum += row[i] >= least ? row[i] : 0.0f;
    for (std::int32_t i = 0; i < signals; ++i) {
      if (row[i] >= least) mixture.terms.push_back({i, row[i] / sum});
    }
    mixture.first.push_back(static_cast<std::int32_t>(mixture.terms.size()));
  }
  return mixture;
}

/// The target's own attention a round ago, a row for each group: counts[g] weights at ascending positions, or, where
/// counts[g] is keep_all, one for every position. 0 entries: there is none yet.
template <backend B = cpu>
struct attention_history {
  view<const float, 2, B> weights;           ///< [groups, capacity] unit mass
  view<const std::int32_t, 2, B> positions;  ///< [groups, capacity]
  view<const std::int32_t, 1, B> counts;     ///< [groups]
};

/// One sequence's signals and where its importance goes.
///
/// Row (step, layer, head) of `draft_weights` holds kv_len weights over the prefix; rows are scaled to unit mass here,
/// then averaged over the steps.
template <backend B = cpu>
struct importance_args {
  view<const float, 4, B> draft_weights;  ///< [steps, draft layers, q_heads, capacity]
  view<const float, 3, B> masses;         ///< [steps, draft layers, q_heads] what a row sums to over the prefix
  attention_history<B> history;           ///< empty: none
  std::int32_t kv_len = 0;
  bool separate_steps = false;  ///< a row for each step instead of their mean
  view<float, 4, B> out;        ///< [target layers, kv_heads, 1 or steps, kv_len]
};

namespace detail {
/// The backend's implementation.  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
template <backend B>
struct importance_impl;
}  // namespace detail

/// Bytes of workspace that mix_importance() takes from the context.
template <backend B>
std::size_t importance_workspace_bytes(const context<B>& ctx, const sparse_mixture& mixture, std::ptrdiff_t steps) {
  return detail::importance_impl<B>::workspace_bytes(ctx, mixture, steps);
}

/// Writes the importance of every prefix position for every group of the mixture. A group whose signals are all
/// absent (no history yet) is scaled by what is there.
/// \cost  reads steps × draft heads × kv_len weights once; terms × kv_len multiply-adds
template <backend B>
void mix_importance(context<B>& ctx, const sparse_mixture& mixture, const importance_args<B>& args) {
  const signal_set& signals = mixture.signals;
  const auto steps = args.draft_weights.extent(0);
  detail::expects(
      args.draft_weights.extent(1) == signals.draft_layers && args.draft_weights.extent(2) == signals.draft_q_heads,
      "importance: weights of ", args.draft_weights.extent(1), " draft layers × ", args.draft_weights.extent(2),
      " heads, the mixture is over ", signals.draft_layers, " × ", signals.draft_q_heads);
  detail::expects(steps >= 1 && args.masses.extent(0) == steps && args.masses.extent(1) == signals.draft_layers &&
                      args.masses.extent(2) == signals.draft_q_heads,
                  "importance: masses of [", args.masses.extent(0), ", ", args.masses.extent(1), ", ",
                  args.masses.extent(2), "] for weights of ", steps, " steps");
  const std::ptrdiff_t rows = args.separate_steps ? steps : 1;
  detail::expects(args.out.extent(1) == mixture.kv_heads &&
                      args.out.extent(0) * mixture.kv_heads == mixture.groups() && args.out.extent(2) == rows &&
                      args.out.extent(3) >= args.kv_len,
                  "importance: out is [", args.out.extent(0), ", ", args.out.extent(1), ", ", args.out.extent(2),
                  ", ", args.out.extent(3), "], needed [", mixture.groups() / mixture.kv_heads, ", ",
                  mixture.kv_heads, ", ", rows, ", ", args.kv_len, "]");
  detail::importance_impl<B>::run(ctx, mixture, args);  // incomplete? include <specattn/specattn.hpp> (cpu)
}

}  // namespace specattn::inline v0_1
