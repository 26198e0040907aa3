// Which draft attention guides which target attention: divergences, the paper's layer map, and mixtures.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "backend.hpp"
#include "error.hpp"
#include "view.hpp"

namespace specattn::inline v0_1 {

/// What identifies a model to an alignment: one made for other models is refused.
struct model_fingerprint {
  std::string name;          ///< for messages only
  std::int32_t layers = 0;
  std::int32_t q_heads = 0;
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t vocab = 0;
  std::uint64_t weights = 0;  ///< a hash of the weights that the caller computes; 0: not compared

  /// True when everything but the name agrees (weights only where both sides know them).
  bool matches(const model_fingerprint& other) const;
};

/// The signals a mixture is made of, in this order: every draft head (layer by layer), one recency window each, the
/// sinks, and the target's own weights of the round before. Each is a distribution over the prefix.
struct signal_set {
  std::int32_t draft_layers = 0;
  std::int32_t draft_q_heads = 0;
  std::vector<std::int32_t> windows;  ///< uniform over the last w positions
  std::int32_t sinks = 0;             ///< uniform over the first positions; 0: no such signal
  bool history = false;               ///< the same (layer, kv head) of the target, one round ago

  std::int32_t draft_heads() const { return draft_layers * draft_q_heads; }
  std::int32_t count() const {
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
  std::vector<float> divergence;          ///< [target layers, draft layers] mean KL(target ‖ draft) of head means, nats

  /// The paper's rule in the same form: target layer j takes the mean over the heads of draft layer layer_map[j].
  alignment layer_map_only() const;
  /// Throws contract_error naming the first inconsistency (sizes, negative or non-finite numbers, a row whose sum is
  /// not one within 1e-3, a map that decreases or leaves the draft).
  void check() const;
};

/// Mean over samples of KL(target ‖ draft) between every target row and every draft row, in nats.
/// Rows are distributions over the same positions (normalised here; zeros of the draft are floored at 1e-10 of its
/// mass so that a divergence stays finite).
class divergence_accumulator {
 public:
  divergence_accumulator(std::int32_t target_rows, std::int32_t draft_rows);
  /// \param target [target_rows, length] \param draft [draft_rows, length]. Cost: target_rows * draft_rows * length.
  void add(context<cpu>& ctx, view<const float, 2> target, view<const float, 2> draft);
  std::int64_t samples() const;
  std::vector<float> mean() const;  ///< [target_rows, draft_rows]
};

/// The paper's layer map: the non-decreasing assignment of a draft layer to each target layer with the least total
/// divergence, by dynamic programming; ties take the smaller draft layer. `divergence` [target layers, draft layers].
std::vector<std::int32_t> monotone_layer_map(view<const float, 2> divergence);

/// Fits, for each target row, the convex combination of signals with the least mean KL(target ‖ combination):
/// expectation–maximisation for mixture proportions (convex, so any start with full support reaches the optimum).
class mixture_fit {
 public:
  /// \param groups         target (layer, kv head) pairs
  /// \param shared_signals signals every group sees \param own_signals signals of each group alone (history)
  mixture_fit(std::int32_t groups, std::int32_t shared_signals, std::int32_t own_signals);
  /// Copies one sample. \param target [groups, length] \param shared [shared_signals, length]
  /// \param own [groups, own_signals, length], empty when own_signals is 0. Rows are normalised here.
  void add(view<const float, 2> target, view<const float, 2> shared, view<const float, 3> own);
  std::size_t bytes() const;  ///< of the samples held

  struct result {
    std::vector<float> coefficients;  ///< [groups, shared_signals + own_signals]
    std::vector<float> divergence;    ///< [groups] nats
    std::int32_t iterations = 0;      ///< of the slowest group
  };
  /// Iterates until no group's divergence improves by more than `tolerance` nats.
  result solve(context<cpu>& ctx, std::int32_t max_iterations = 500, float tolerance = 1e-6f) const;
};

}  // namespace specattn::inline v0_1
