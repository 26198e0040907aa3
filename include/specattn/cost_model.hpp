// What a round costs and gains: predicts it from a few coefficients, learns those from rounds that ran, and chooses how
// many tokens to draft and whether a sparse verify pass pays.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "decode_options.hpp"
#include "error.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// Seconds of one pass of a model over `slots` tokens that reads `rows` KV rows (one position's K and V in one layer
/// and kv head). Linear: a GPU's passes are bound by bytes (start: the weights; row), a CPU's by products as well.
struct pass_cost {
  double start = 0;     ///< a pass: its weights, launches
  double slot = 0;      ///< a slot
  double row = 0;       ///< a row read
  double slot_row = 0;  ///< a slot and row

  double seconds(double slots, double rows) const {
    return start + slot * slots + row * rows + slot_row * slots * rows;
  }
  /// The least a pass can take on a device that moves bytes_per_second.
  static pass_cost of_bytes(double weight_bytes, double bytes_a_row, double bytes_per_second) {
    return {.start = weight_bytes / bytes_per_second, .row = bytes_a_row / bytes_per_second};
  }
};

struct round_cost {
  pass_cost target;
  pass_cost draft;
  double guide = 0;           ///< seconds of a sparse round's importance and selection
  double guide_position = 0;  ///< and for each prefix position of each sequence
};

/// What a round works on. Kept shares are of the prefix.
struct round_workload {
  double sequences = 1;
  double kv_len = 0;            ///< mean of the sequences
  double target_rows = 0;       ///< KV rows of a position: layers × kv_heads
  double draft_rows = 0;        ///< of the draft's
  double kept_share = 1;        ///< in a sparse verify pass
  double draft_kept_share = 1;  ///< that a draft step reads, with its part of what recording reads; 1: a dense draft
  double more_steps = 0;  ///< draft steps of a sparse round besides one a token, on average: 1 where every round
                          ///< records for its guide
  double acceptance = 0;  ///< chance that a drafted token is accepted where those before it were
};

struct round_setting {
  std::int32_t draft_length = 0;  ///< γ
  bool sparse = false;            ///< the verify pass reads a selection
};

/// Tokens a round emits for each sequence, on average: 1 + a + … + a^γ (Leviathan et al., arXiv 2211.17192).
inline double tokens_a_round(double acceptance, std::int32_t draft_length) {
  double tokens = 1.0;
  for (std::int32_t i = 0; i < draft_length; ++i) tokens = 1.0 + acceptance * tokens;
  return tokens;
}

/// Predicted seconds of a round.
inline double round_seconds(const round_cost& cost, const round_workload& work, round_setting setting) {
  const double prefix = work.sequences * work.kv_len;
  const double slots = work.sequences * (setting.draft_length + 1);
  const double share = setting.sparse ? work.kept_share : 1.0;
  double seconds = cost.target.seconds(slots, work.target_rows * (prefix * share + slots));
  const double read = prefix * work.draft_kept_share;
  const double steps = setting.draft_length + (setting.sparse && setting.draft_length > 0 ? work.more_steps : 0.0);
  seconds += steps * cost.draft.seconds(work.sequences, work.draft_rows * (read + work.sequences));
  return setting.sparse ? seconds + cost.guide + cost.guide_position * prefix : seconds;
}

/// Predicted tokens a second, over all sequences.
inline double round_rate(const round_cost& cost, const round_workload& work, round_setting setting) {
  return work.sequences * tokens_a_round(work.acceptance, setting.draft_length) / round_seconds(cost, work, setting);
}

/// The fastest setting of draft lengths 1 … longest, dense or, where allowed, sparse; shorter and dense where equal.
inline round_setting fastest_setting(const round_cost& cost, const round_workload& work, std::int32_t longest,
                                     bool may_be_sparse) {
  round_setting best{1, false};
  for (std::int32_t length = 1; length <= longest; ++length) {
    for (const bool sparse : {false, true}) {
      const round_setting setting{length, sparse};
      if (sparse && !may_be_sparse) continue;
      if (round_rate(cost, work, setting) > round_rate(cost, work, best)) best = setting;
    }
  }
  return best;
}

namespace detail {

/// Least squares with coefficients that are not negative; older observations fade.
template <std::size_t N>
class fading_fit {
 public:
  using vector = std::array<double, N>;

  /// \param fade what is left of the weight of each observation before
  void observe(const vector& x, double y, double fade = 0.98) {
    for (std::size_t i = 0; i < N; ++i) {
      for (std::size_t j = 0; j < N; ++j) products_[i][j] = fade * products_[i][j] + x[i] * x[j];
      targets_[i] = fade * targets_[i] + x[i] * y;
    }
  }

  /// The best of the solutions over all subsets of the coefficients that have none below zero.
  vector solve() const {
    vector best{};
    double least = 0.0;  // the loss without the constant: that of no coefficients
    for (unsigned subset = 1; subset < (1u << N); ++subset) {
      const vector solution = solve_subset(subset);
      double loss = 0.0;
      bool valid = true;
      for (std::size_t i = 0; i < N; ++i) {
        valid = valid && solution[i] >= 0.0 && std::isfinite(solution[i]);
        loss -= 2.0 * solution[i] * targets_[i];
        for (std::size_t j = 0; j < N; ++j) loss += solution[i] * products_[i][j] * solution[j];
      }
      if (valid && loss < least) {
        least = loss;
        best = solution;
      }
    }
    return best;
  }

 private:
  /// Gaussian elimination; a little ridge, relative to each coefficient, where observations cannot tell two apart.
  vector solve_subset(unsigned subset) const {
    constexpr double ridge = 1e-6;
    std::array<std::array<double, N + 1>, N> rows{};
    for (std::size_t i = 0; i < N; ++i) {
      const bool used = (subset >> i & 1u) != 0;
      for (std::size_t j = 0; j < N; ++j) rows[i][j] = used && (subset >> j & 1u) != 0 ? products_[i][j] : 0.0;
      rows[i][i] = used ? rows[i][i] * (1.0 + ridge) : 1.0;
      rows[i][N] = used ? targets_[i] : 0.0;
    }
    for (std::size_t i = 0; i < N; ++i) {
      for (std::size_t below = 0; below < N; ++below) {
        if (below == i) continue;
        const double factor = rows[below][i] / rows[i][i];
        for (std::size_t j = i; j <= N; ++j) rows[below][j] -= factor * rows[i][j];
      }
    }
    vector solution{};
    for (std::size_t i = 0; i < N; ++i) solution[i] = rows[i][N] / rows[i][i];
    return solution;
  }

  std::array<std::array<double, N>, N> products_{};
  vector targets_{};
};

}  // namespace detail

/// Learns the costs of rounds while they run and chooses the next one's setting. It first tries short and long drafts,
/// sparse and dense, then what it predicts to be fastest, and now and then a neighbour of that. Deterministic but for
/// the times it is given.
class round_planner {
 public:
  /// \param target_rows, draft_rows KV rows of a position: layers × kv_heads
  /// \param longest                 draft length at most, at least 1
  /// \param may_be_sparse           whether there is a guide
  /// \throws contract_error
  round_planner(double target_rows, double draft_rows, std::int32_t longest, bool may_be_sparse)
      : longest_(longest), may_be_sparse_(may_be_sparse) {
    detail::expects(longest >= 1 && longest <= max_draft_length, "round_planner: draft lengths up to ", longest,
                    "; give 1 … ", max_draft_length);
    detail::expects(target_rows > 0 && draft_rows > 0, "round_planner: ", target_rows, " and ", draft_rows,
                    " KV rows a position; both must be positive");
    work_.target_rows = target_rows;
    work_.draft_rows = draft_rows;
  }

  /// The setting of the next round.
  round_setting choose(double sequences, double kv_len) {
    work_.sequences = sequences;
    work_.kv_len = kv_len;
    const std::int32_t turn = turn_++;
    if (turn < trials * repeats) return trial(turn % trials);
    const round_setting best = fastest_setting(cost(), workload(), longest_, may_be_sparse_);
    if (turn % explore_every != 0) return best;
    const std::int32_t kind = turn / explore_every % 3;
    if (kind == 2 && may_be_sparse_) return {best.draft_length, !best.sparse};
    const std::int32_t length = best.draft_length + (kind == 0 ? 1 : -1);
    return {(std::clamp)(length, std::int32_t{1}, longest_), best.sparse};
  }

  /// Takes in a round that ran. Rounds that were refreshed are not like others and are left out.
  void learn(const round_trace& trace, double kv_len) {
    const decode_counts& c = trace.counts;
    if (c.refreshed > 0 || c.rounds == 0) return;
    const auto slots = static_cast<double>(c.proposed + c.rounds);
    const auto rows = static_cast<double>(c.kv_rows_read);
    target_.observe({1.0, slots, rows, slots * rows}, trace.verify_seconds + trace.accept_seconds);
    if (c.proposed > 0) {
      const double steps = static_cast<double>(c.draft_steps) / static_cast<double>(c.rounds);
      draft_.observe({steps, static_cast<double>(c.draft_steps), static_cast<double>(c.draft_rows_read)},
                     trace.draft_seconds);
      // Of the drafted tokens that were judged (those after a rejected one were not), how many were accepted.
      accepted_ = fade * accepted_ + static_cast<double>(c.accepted);
      judged_ = fade * judged_ + static_cast<double>(c.accepted + c.corrected);
      draft_read_ = fade * draft_read_ + static_cast<double>(c.draft_rows_read);
      draft_read_of_ = fade * draft_read_of_ + static_cast<double>(c.draft_rows_dense);
    }
    if (c.dense_rounds < c.rounds) {
      guide_.observe({1.0, static_cast<double>(c.rounds) * kv_len}, trace.guide_seconds);
      kept_ = fade * kept_ + rows;
      kept_of_ = fade * kept_of_ + static_cast<double>(c.kv_rows_dense);
      more_steps_ = fade * more_steps_ + static_cast<double>(c.draft_steps - c.proposed);
      more_steps_of_ = fade * more_steps_of_ + static_cast<double>(c.rounds);
    }
  }

  round_cost cost() const {
    const auto target = target_.solve();
    const auto draft = draft_.solve();
    const auto guide = guide_.solve();
    return {{target[0], target[1], target[2], target[3]}, {draft[0], draft[1], draft[2], 0.0}, guide[0], guide[1]};
  }
  /// The workload of the last choose(), with what was learnt of acceptance and kept shares.
  round_workload workload() const {
    round_workload work = work_;
    work.acceptance = judged_ > 0 ? accepted_ / judged_ : 0.5;
    work.kept_share = kept_of_ > 0 ? kept_ / kept_of_ : 1.0;
    work.more_steps = more_steps_of_ > 0 ? more_steps_ / more_steps_of_ : 0.0;
    work.draft_kept_share = draft_read_of_ > 0 ? draft_read_ / draft_read_of_ : 1.0;
    return work;
  }

 private:
  static constexpr double fade = 0.98;
  static constexpr std::int32_t trials = 6;
  static constexpr std::int32_t repeats = 2;  // the first of each warms up
  static constexpr std::int32_t explore_every = 32;

  /// Short, long and middling drafts, sparse and dense.
  round_setting trial(std::int32_t i) const {
    const std::int32_t lengths[] = {1, longest_, (longest_ + 1) / 2};
    return {lengths[i % 3], may_be_sparse_ && i < trials / 2};
  }

  std::int32_t longest_;
  bool may_be_sparse_;
  std::int32_t turn_ = 0;
  round_workload work_;
  detail::fading_fit<4> target_;
  detail::fading_fit<3> draft_;
  detail::fading_fit<2> guide_;
  double accepted_ = 0, judged_ = 0;
  double kept_ = 0, kept_of_ = 0;
  double draft_read_ = 0, draft_read_of_ = 0;
  double more_steps_ = 0, more_steps_of_ = 0;
};

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
