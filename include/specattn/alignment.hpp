// Which draft attention guides which target attention: divergences, the paper's layer map, and mixtures.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "backend.hpp"
#include "error.hpp"
#include "mixture_search.hpp"
#include "view.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_DATA {

/// What identifies a model to an alignment: one made for other models is refused.
struct model_fingerprint {
  std::string name;  ///< for messages only
  std::int32_t layers = 0;
  std::int32_t q_heads = 0;
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t vocab = 0;
  std::uint64_t weights = 0;  ///< a hash of the weights that the caller computes; 0: not compared

  /// True when everything but the name agrees (weights only where both sides know them).
  [[gnu::always_inline]] bool matches(const model_fingerprint& other) const {
    return layers == other.layers && q_heads == other.q_heads && kv_heads == other.kv_heads &&
           head_dim == other.head_dim && vocab == other.vocab &&
           (weights == 0 || other.weights == 0 || weights == other.weights);
  }
};

/// The signals a mixture is made of, in this order: every draft head (layer by layer), one recency window each, the
/// sinks, and the target's own weights of the round before. Each is a distribution over the prefix.
struct signal_set {
  std::int32_t draft_layers = 0;
  std::int32_t draft_q_heads = 0;
  std::vector<std::int32_t> windows;  ///< uniform over the last w positions
  std::int32_t sinks = 0;             ///< uniform over the first positions; 0: no such signal
  bool history = false;               ///< the same (layer, kv head) of the target, one round ago

  [[gnu::always_inline]] std::int32_t draft_heads() const { return draft_layers * draft_q_heads; }
  [[gnu::always_inline]] std::int32_t count() const {
    return draft_heads() + static_cast<std::int32_t>(windows.size()) + (sinks > 0 ? 1 : 0) + (history ? 1 : 0);
  }
};

/// A calibrated pair: coefficients of the signals for each target (layer, kv head), and where they come from.
struct alignment {
  model_fingerprint draft;
  model_fingerprint target;
  signal_set signals;
  std::vector<float> coefficients;        ///< [target layers, target kv_heads, signals] non-negative, rows sum to one
  std::vector<float> mixture_divergence;  ///< [target layers, target kv_heads] nats left after the fit
  std::vector<std::int32_t> layer_map;    ///< [target layers] draft layer, non-decreasing
  std::vector<float> divergence;  ///< [target layers, draft layers] mean KL(target ‖ draft) of head means, nats

  /// The paper's rule in the same form: target layer j takes the mean over the heads of draft layer layer_map[j]. Its
  /// mixture_divergence is that of the two layers' head means.
  alignment layer_map_only() const;
  /// Throws contract_error naming the first inconsistency (sizes, limits, negative or non-finite numbers, a row whose sum is
  /// not one within 1e-3, a map that decreases or leaves the draft).
  void check() const;
};

}  // namespace specattn::inline SPECATTN_DATA

namespace specattn::inline SPECATTN_CODE {

namespace detail {

/// More layers or heads than any model has: products of two stay far from overflowing.
inline constexpr std::int32_t largest_model_part = 1 << 15;

/// Every number of a vector finite and >= 0.
inline void check_numbers(const std::vector<float>& numbers, const char* what) {
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    expects(std::isfinite(numbers[i]) && numbers[i] >= 0.0f, "alignment: ", what, " holds ", numbers[i], " at ", i);
  }
}

}  // namespace detail

}  // namespace specattn::inline SPECATTN_CODE

namespace specattn::inline SPECATTN_DATA {

// The two are always inlined: the name of a member of plain data does not say which CPU it was compiled for.
[[gnu::always_inline]] inline void alignment::check() const {
  using detail::expects;
  for (const model_fingerprint* model : {&draft, &target}) {
    expects((std::max)({model->layers, model->q_heads, model->kv_heads}) <= detail::largest_model_part,
            "alignment: a model of ", model->layers, " layers, ", model->q_heads, " q_heads and ", model->kv_heads,
            " kv_heads; none may exceed ", detail::largest_model_part);
    expects(model->layers > 0 && model->q_heads > 0 && model->kv_heads > 0 && model->q_heads % model->kv_heads == 0,
            "alignment: a model of ", model->layers, " layers, ", model->q_heads, " q_heads and ", model->kv_heads,
            " kv_heads");
  }
  expects(signals.draft_layers == draft.layers && signals.draft_q_heads == draft.q_heads, "alignment: signals of ",
          signals.draft_layers, " × ", signals.draft_q_heads, " draft heads, the draft has ", draft.layers, " × ",
          draft.q_heads);
  expects(signals.windows.size() <= 64, "alignment: ", signals.windows.size(), " recency windows; at most 64");
  for (std::int32_t window : signals.windows) expects(window > 0, "alignment: a recency window of ", window);
  expects(signals.sinks >= 0, "alignment: a sink signal over ", signals.sinks, " positions");
  const auto count = static_cast<std::size_t>(signals.count());
  const auto target_layers = static_cast<std::size_t>(target.layers);
  const std::size_t groups = target_layers * static_cast<std::size_t>(target.kv_heads);
  expects(coefficients.size() == groups * count, "alignment: ", coefficients.size(), " coefficients for ", groups,
          " groups × ", count, " signals");
  expects(mixture_divergence.size() == groups, "alignment: ", mixture_divergence.size(), " divergences for ", groups,
          " groups");
  expects(divergence.size() == target_layers * static_cast<std::size_t>(draft.layers), "alignment: a matrix of ",
          divergence.size(), " divergences for ", target_layers, " × ", draft.layers, " layers");
  expects(layer_map.size() == target_layers, "alignment: a map of ", layer_map.size(), " layers, the target has ",
          target_layers);
  detail::check_numbers(coefficients, "coefficients");
  detail::check_numbers(mixture_divergence, "mixture_divergence");
  detail::check_numbers(divergence, "divergence");
  for (std::size_t g = 0; g < groups; ++g) {
    double sum = 0.0;
    for (std::size_t i = 0; i < count; ++i) sum += static_cast<double>(coefficients[g * count + i]);
    expects(std::abs(sum - 1.0) <= 1e-3, "alignment: the coefficients of group ", g, " sum to ", sum);
  }
  for (std::size_t j = 0; j < layer_map.size(); ++j) {
    expects(layer_map[j] >= 0 && layer_map[j] < draft.layers && (j == 0 || layer_map[j] >= layer_map[j - 1]),
            "alignment: target layer ", j, " maps to draft layer ", layer_map[j],
            ", which decreases or is outside 0 … ", draft.layers - 1);
  }
}

[[gnu::always_inline]] inline alignment alignment::layer_map_only() const {
  alignment one_hot = *this;
  one_hot.signals.windows.clear();
  one_hot.signals.sinks = 0;
  one_hot.signals.history = false;
  const auto count = static_cast<std::size_t>(one_hot.signals.count());
  const auto heads = static_cast<std::size_t>(draft.q_heads);
  one_hot.coefficients.assign(mixture_divergence.size() * count, 0.0f);
  for (std::size_t g = 0; g < mixture_divergence.size(); ++g) {
    const std::size_t j = g / static_cast<std::size_t>(target.kv_heads);
    const auto layer = static_cast<std::size_t>(layer_map[j]);
    for (std::size_t h = 0; h < heads; ++h) {
      one_hot.coefficients[g * count + layer * heads + h] = 1.0f / static_cast<float>(heads);
    }
    one_hot.mixture_divergence[g] = divergence[j * static_cast<std::size_t>(draft.layers) + layer];
  }
  return one_hot;
}

}  // namespace specattn::inline SPECATTN_DATA

namespace specattn::inline SPECATTN_CODE {

/// The paper's layer map: the non-decreasing assignment of a draft layer to each target layer with the least total
/// divergence, by dynamic programming; of equal ones that which takes the smaller draft layers, the last target layer
/// first. `divergence` [target layers, draft layers], any finite numbers.
inline std::vector<std::int32_t> monotone_layer_map(view<const float, 2> divergence) {
  const std::ptrdiff_t targets = divergence.extent(0);
  const std::ptrdiff_t drafts = divergence.extent(1);
  detail::expects(targets > 0 && drafts > 0, "monotone_layer_map: a matrix of ", targets, " × ", drafts, " layers");
  for (std::ptrdiff_t j = 0; j < targets; ++j) {
    for (std::ptrdiff_t i = 0; i < drafts; ++i) {
      detail::expects(std::isfinite(divergence(j, i)), "monotone_layer_map: the divergence of target layer ", j,
                      " and draft layer ", i, " is ", divergence(j, i));
    }
  }
  const auto at = [drafts](std::ptrdiff_t j, std::ptrdiff_t i) { return static_cast<std::size_t>(j * drafts + i); };
  std::vector<double> cost(static_cast<std::size_t>(targets * drafts));  // least total of layers 0 … j with j on i
  std::vector<std::int32_t> from(cost.size());
  for (std::ptrdiff_t j = 0; j < targets; ++j) {
    std::ptrdiff_t best = 0;
    for (std::ptrdiff_t i = 0; i < drafts; ++i) {
      if (j > 0 && cost[at(j - 1, i)] < cost[at(j - 1, best)]) best = i;
      cost[at(j, i)] = static_cast<double>(divergence(j, i)) + (j > 0 ? cost[at(j - 1, best)] : 0.0);
      from[at(j, i)] = static_cast<std::int32_t>(best);
    }
  }
  std::vector<std::int32_t> map(static_cast<std::size_t>(targets));
  std::ptrdiff_t last = 0;
  for (std::ptrdiff_t i = 1; i < drafts; ++i) {
    if (cost[at(targets - 1, i)] < cost[at(targets - 1, last)]) last = i;
  }
  for (std::ptrdiff_t j = targets - 1; j >= 0; --j) {
    map[static_cast<std::size_t>(j)] = static_cast<std::int32_t>(last);
    last = from[at(j, last)];
  }
  return map;
}

/// Mean over samples of KL(target ‖ draft) between every target row and every draft row, in nats.
/// Rows are distributions over the same positions, normalised here; below 1e-10 of its mass a draft row counts as
/// that, so that a divergence stays finite. The result does not depend on the number of threads or the grid.
///
///   divergence_accumulator(target_rows, draft_rows)
///   add(ctx, target, draft)   [target_rows, length], each with some mass, and [draft_rows, length]. A NaN, infinite or
///                             negative weight or a target without mass is a contract_error, and the sample counts for
///                             nothing
///   workspace_bytes(target_rows, draft_rows, length)   that add() takes from the context; static
///   samples()                 that counted
///   mean()                    vector [target_rows, draft_rows], zeros before the first sample
///
/// \cost of add(): (target_rows + draft_rows) * length logarithms, target_rows * draft_rows * length multiply-adds
/// \sync cuda: add() is queued on the context's stream; samples() and mean() wait for it, and it is mean() that throws for a
///       broken sample
/// incomplete? include <specattn/specattn.hpp>, for cuda <specattn/cuda.cuh>
template <backend B = cpu>
class divergence_accumulator;

/// Fits, for each target row, the convex combination of signals with the least mean KL(target ‖ combination):
/// expectation–maximisation for mixture proportions, accelerated (SQUAREM; Varadhan and Roland, Scand. J. Stat. 2008).
/// The problem is convex, and the gradient bounds how far from the optimum a fit can be: that bound is the stop rule.
/// The result does not depend on the number of threads or the grid.
///
///   mixture_fit(groups, shared_signals, own_signals)   target (layer, kv head) pairs; signals every group sees; signals of
///                                                      each group alone (history)
///   add(ctx, target, shared, own)   copies one sample: [groups, length], [shared_signals, length] and
///                                   [groups, own_signals, length], empty when own_signals is 0. Rows are normalised; a
///                                   signal without mass contributes nothing, nor does a target without mass. A NaN,
///                                   infinite or negative weight is a contract_error, and nothing is kept
///   bytes()                         of the samples held
///   solve(ctx, max_iterations = 500, tolerance = 1e-4)   iterates until no group's divergence exceeds its optimum by
///                                   more than `tolerance` nats; a mixture_result. Throws contract_error without samples
///
/// \cost of solve(): an iteration reads every sample once for each group: 4 * signals flop and a logarithm a position
/// \sync cuda: add() allocates and is queued; solve() waits once an iteration, and it is solve() that throws for a broken
///       sample
/// incomplete? include <specattn/specattn.hpp>, for cuda <specattn/cuda.cuh>
template <backend B = cpu>
class mixture_fit;

}  // namespace specattn::inline SPECATTN_CODE

namespace specattn::inline SPECATTN_DATA {

struct mixture_result {
  std::vector<float> coefficients;  ///< [groups, shared_signals + own_signals] non-negative, rows sum to one
  std::vector<float> divergence;    ///< [groups] nats
  std::vector<float> excess;        ///< [groups] nats by which `divergence` exceeds the optimum at most
  std::int32_t iterations = 0;      ///< readings of the samples, of the slowest group
};

}  // namespace specattn::inline SPECATTN_DATA

namespace specattn::inline SPECATTN_CODE {

namespace detail {

inline void check_divergence_rows(std::ptrdiff_t targets, std::ptrdiff_t drafts) {
  expects(targets > 0 && drafts > 0, "divergence_accumulator: ", targets, " target rows and ", drafts, " draft rows");
}

template <backend B>
void check_divergence_sample(std::ptrdiff_t targets, std::ptrdiff_t drafts, const view<const float, 2, B>& target,
                             const view<const float, 2, B>& draft) {
  expects(target.extent(0) == targets && draft.extent(0) == drafts && draft.extent(1) == target.extent(1),
          "divergence: rows [", target.extent(0), ", ", target.extent(1), "] and [", draft.extent(0), ", ",
          draft.extent(1), "], expected ", targets, " and ", drafts, " rows of one length");
}

inline void check_mixture(std::ptrdiff_t groups, std::ptrdiff_t shared, std::ptrdiff_t own) {
  expects(groups > 0 && shared >= 0 && own >= 0 && (shared > 0 || own > 0), "mixture_fit: ", groups, " groups, ",
          shared, " shared and ", own, " own signals");
}

template <backend B>
void check_mixture_sample(std::ptrdiff_t groups, std::ptrdiff_t shared, std::ptrdiff_t own,
                          const view<const float, 2, B>& target, const view<const float, 2, B>& signals,
                          const view<const float, 3, B>& history) {
  const std::ptrdiff_t length = target.extent(1);
  expects(target.extent(0) == groups && signals.extent(0) == shared && (shared == 0 || signals.extent(1) == length) &&
              (own == 0 || (history.extent(0) == groups && history.extent(1) == own && history.extent(2) == length)),
          "mixture_fit: a sample of ", target.extent(0), " targets and ", signals.extent(0),
          " shared signals, expected ", groups, " and ", shared, ", all of one length");
}

/// What the searches of all groups have found.
inline mixture_result collect(const std::vector<mixture_search>& searches) {
  mixture_result found;
  for (const mixture_search& one : searches) {
    for (double c : one.best().coefficients) found.coefficients.push_back(static_cast<float>(c));
    found.divergence.push_back(static_cast<float>((std::max)(one.best().divergence, 0.0)));
    found.excess.push_back(static_cast<float>(one.best().excess()));
    found.iterations = (std::max)(found.iterations, one.readings());
  }
  return found;
}

}  // namespace detail

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
