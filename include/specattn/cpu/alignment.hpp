// Fitting an alignment on the cpu: divergences between attention rows, and mixtures by expectation–maximisation.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "../alignment.hpp"
#include "../error.hpp"
#include "../view.hpp"
#include "context.hpp"

namespace specattn::inline v0_1 {
namespace detail {

/// Where an approximating distribution is smaller it counts as this much of its mass: a divergence stays finite.
inline constexpr float divergence_floor = 1e-10f;

/// Copies a row scaled to unit mass; a row without mass becomes zeros. False where a weight is negative, infinite or
/// NaN.
inline bool copy_normalised(view<const float, 1> row, float* out) {
  double mass = 0.0;
  bool sound = true;
  for (std::ptrdiff_t i = 0; i < row.extent(0); ++i) {
    out[i] = row[i];
    mass += static_cast<double>(out[i]);
    sound = sound && out[i] >= 0.0f;
  }
  if (!sound || !std::isfinite(mass)) return false;
  if (mass > 0.0) {
    for (std::ptrdiff_t i = 0; i < row.extent(0); ++i) {
      out[i] = static_cast<float>(static_cast<double>(out[i]) / mass);
    }
  }
  return true;
}

/// Sum of products. Runs over independent lanes, which compilers turn into vector code, added up in one fixed order.
inline double dot(const float* a, const float* b, std::ptrdiff_t length) {
  constexpr std::ptrdiff_t lanes = 16, stretch = 32 * lanes;
  double total = 0.0;
  for (std::ptrdiff_t first = 0; first < length; first += stretch) {
    const std::ptrdiff_t end = (std::min)(first + stretch, length);
    float sums[lanes] = {};
    std::ptrdiff_t i = first;
    for (; i + lanes <= end; i += lanes) {
      for (std::ptrdiff_t j = 0; j < lanes; ++j) sums[j] += a[i + j] * b[i + j];
    }
    for (std::ptrdiff_t j = 0; i + j < end; ++j) sums[j] += a[i + j] * b[i + j];
    for (std::ptrdiff_t j = 0; j < lanes; ++j) total += static_cast<double>(sums[j]);
  }
  return total;
}

/// Natural logarithm of a positive normal number, to single precision. No library call: vectorises.
inline float logarithm(float x) {
  const auto bits = std::bit_cast<std::int32_t>(x);
  const std::int32_t exponent =
      (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: sqrt(1/2), below which one more halving counts
  const float f = std::bit_cast<float>(bits - exponent * (1 << 23)) - 1.0f, n = static_cast<float>(exponent);
  float series = 7.0376836292e-2f;
  series = series * f - 1.1514610310e-1f;
  series = series * f + 1.1676998740e-1f;
  series = series * f - 1.2420140846e-1f;
  series = series * f + 1.4249322787e-1f;
  series = series * f - 1.6668057665e-1f;
  series = series * f + 2.0000714765e-1f;
  series = series * f - 2.4999993993e-1f;
  series = series * f + 3.3333331174e-1f;
  return f + (series * (f * f * f) - 0.5f * (f * f) + n * -2.12194440e-4f) + n * 0.693359375f;
}

}  // namespace detail

/// Mean over samples of KL(target ‖ draft) between every target row and every draft row, in nats.
/// Rows are distributions over the same positions, normalised here; below 1e-10 of its mass a draft row counts as
/// that, so that a divergence stays finite. The result does not depend on the number of threads.
class divergence_accumulator {
 public:
  divergence_accumulator(std::int32_t target_rows, std::int32_t draft_rows)
      : targets_(target_rows), drafts_(draft_rows) {
    detail::expects(target_rows > 0 && draft_rows > 0, "divergence_accumulator: ", target_rows, " target rows and ",
                    draft_rows, " draft rows");
    sums_.resize(static_cast<std::size_t>(targets_ * drafts_));
    entropies_.resize(static_cast<std::size_t>(targets_));
  }

  /// \param target [target_rows, length], each with some mass \param draft [draft_rows, length]
  /// \throws contract_error, and counts nothing, for a NaN, infinite or negative weight or a target without mass
  /// \cost  (target_rows + draft_rows) * length logarithms, target_rows * draft_rows * length multiply-adds
  void add(context<cpu>& ctx, view<const float, 2> target, view<const float, 2> draft) {
    const std::ptrdiff_t length = target.extent(1), rows = targets_ + drafts_;
    detail::expects(target.extent(0) == targets_ && draft.extent(0) == drafts_ && draft.extent(1) == length,
                    "divergence: rows [", target.extent(0), ", ", length, "] and [", draft.extent(0), ", ",
                    draft.extent(1), "], expected ", targets_, " and ", drafts_, " rows of one length");
    rows_.resize(static_cast<std::size_t>(rows * length));
    for (std::ptrdiff_t r = 0; r < rows; ++r) {
      float* const out = rows_.data() + r * length;
      detail::expects(detail::copy_normalised(r < targets_ ? target[r] : draft[r - targets_], out),
                      "divergence: ", r < targets_ ? "target" : "draft", " row ", r < targets_ ? r : r - targets_,
                      " holds a weight that is negative or no number");
      detail::expects(r >= targets_ || std::any_of(out, out + length, [](float w) { return w > 0.0f; }),
                      "divergence: target row ", r, " has no mass");
    }
    ctx.parallel_for(rows, [&](std::ptrdiff_t r, int) { take_logarithms(r, rows_.data() + r * length, length); });
    ctx.parallel_for(targets_ * drafts_, [&](std::ptrdiff_t pair, int) {
      const float* const p = rows_.data() + pair / drafts_ * length;
      const float* const log_q = rows_.data() + (targets_ + pair % drafts_) * length;
      sums_[static_cast<std::size_t>(pair)] +=
          entropies_[static_cast<std::size_t>(pair / drafts_)] - detail::dot(p, log_q, length);
    });
    ++samples_;
  }

  std::int64_t samples() const { return samples_; }
  std::vector<float> mean() const {  ///< [target_rows, draft_rows]; zeros before the first sample
    std::vector<float> means(sums_.size());
    for (std::size_t i = 0; i < sums_.size(); ++i) {
      const double mean = samples_ > 0 ? sums_[i] / static_cast<double>(samples_) : 0.0;
      means[i] = static_cast<float>((std::max)(mean, 0.0));  // rounding must not leave a negative divergence
    }
    return means;
  }

 private:
  /// Of a target row its sum of p log p; a draft row is replaced by its logarithms.
  void take_logarithms(std::ptrdiff_t r, float* row, std::ptrdiff_t length) {
    if (r >= targets_) {
      for (std::ptrdiff_t i = 0; i < length; ++i) row[i] = std::log((std::max)(row[i], detail::divergence_floor));
      return;
    }
    double sum = 0.0;
    for (std::ptrdiff_t i = 0; i < length; ++i) {
      if (row[i] > 0.0f) sum += static_cast<double>(row[i]) * static_cast<double>(std::log(row[i]));
    }
    entropies_[static_cast<std::size_t>(r)] = sum;
  }

  std::ptrdiff_t targets_;
  std::ptrdiff_t drafts_;
  std::vector<double> sums_;
  std::vector<double> entropies_;
  std::vector<float> rows_;  // of the sample at hand
  std::int64_t samples_ = 0;
};

/// Fits, for each target row, the convex combination of signals with the least mean KL(target ‖ combination):
/// expectation–maximisation for mixture proportions, accelerated (SQUAREM; Varadhan and Roland, Scand. J. Stat. 2008).
/// The problem is convex, and the gradient bounds how far from the optimum a fit can be: that bound is the stop rule.
/// The result does not depend on the number of threads.
class mixture_fit {
 public:
  /// \param groups         target (layer, kv head) pairs
  /// \param shared_signals signals every group sees \param own_signals signals of each group alone (history)
  mixture_fit(std::int32_t groups, std::int32_t shared_signals, std::int32_t own_signals)
      : groups_(groups), shared_(shared_signals), own_(own_signals) {
    detail::expects(groups > 0 && shared_signals >= 0 && own_signals >= 0 && (shared_signals > 0 || own_signals > 0),
                    "mixture_fit: ", groups, " groups, ", shared_signals, " shared and ", own_signals,
                    " own signals");
  }

  /// Copies one sample. \param target [groups, length] \param shared [shared_signals, length]
  /// \param own [groups, own_signals, length], empty when own_signals is 0. Rows are normalised here; a signal without
  /// mass contributes nothing, nor does a target without mass.
  /// \throws contract_error, and keeps nothing, for a NaN, infinite or negative weight
  void add(view<const float, 2> target, view<const float, 2> shared, view<const float, 3> own) {
    const std::ptrdiff_t length = target.extent(1);
    detail::expects(target.extent(0) == groups_ && shared.extent(0) == shared_ &&
                        (shared_ == 0 || shared.extent(1) == length) &&
                        (own_ == 0 || (own.extent(0) == groups_ && own.extent(1) == own_ && own.extent(2) == length)),
                    "mixture_fit: a sample of ", target.extent(0), " targets and ", shared.extent(0),
                    " shared signals, expected ", groups_, " and ", shared_, ", all of one length");
    sample s{length, std::vector<float>(static_cast<std::size_t>((groups_ + shared_ + groups_ * own_) * length))};
    float* out = s.rows.data();
    const auto take = [&](view<const float, 1> row, const char* what, std::ptrdiff_t number) {
      detail::expects(detail::copy_normalised(row, out), "mixture_fit: ", what, " ", number,
                      " holds a weight that is negative or no number");
      out += length;
    };
    for (std::ptrdiff_t g = 0; g < groups_; ++g) take(target[g], "target", g);
    for (std::ptrdiff_t i = 0; i < shared_; ++i) take(shared[i], "shared signal", i);
    for (std::ptrdiff_t g = 0; g < groups_; ++g) {
      for (std::ptrdiff_t i = 0; i < own_; ++i) take(own[g][i], "a signal of group", g);
    }
    samples_.push_back(std::move(s));
  }

  /// Of the samples held.
  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const sample& s : samples_) sum += s.rows.size() * sizeof(float);
    return sum;
  }

  struct result {
    std::vector<float> coefficients;  ///< [groups, shared_signals + own_signals] non-negative, rows sum to one
    std::vector<float> divergence;    ///< [groups] nats
    std::vector<float> excess;        ///< [groups] nats by which `divergence` exceeds the optimum at most
    std::int32_t iterations = 0;      ///< readings of the samples, of the slowest group
  };

  /// Iterates until no group's divergence exceeds its optimum by more than `tolerance` nats.
  /// \throws contract_error without samples
  /// \cost   an iteration reads every sample once for each group: 4 * signals flop and a logarithm a position
  result solve(context<cpu>& ctx, std::int32_t max_iterations = 500, float tolerance = 1e-4f) const;

 private:
  struct sample {
    std::ptrdiff_t length;
    std::vector<float> rows;  // targets [groups], shared signals, own signals [groups, own], each [length]
  };
  /// A point of a group's search.
  struct trial {
    std::vector<double> coefficients;
    std::vector<double> gain;  // what expectation–maximisation multiplies each coefficient by, not yet normalised
    double divergence = 0.0;

    double gain_of_all() const;
    double excess() const;
    void step_to(std::vector<double>& next) const;
  };
  struct search;
  static constexpr std::ptrdiff_t stretch = 512;  // positions worked on at a time, near the registers

  const float* signal_row(const sample& s, std::ptrdiff_t g, std::ptrdiff_t i) const {
    const std::ptrdiff_t row = i < shared_ ? groups_ + i : groups_ + shared_ + g * own_ + (i - shared_);
    return s.rows.data() + row * s.length;
  }
  void evaluate(std::ptrdiff_t g, trial& at) const;
  void evaluate_stretch(const sample& s, std::ptrdiff_t g, std::ptrdiff_t first, std::ptrdiff_t count,
                        trial& at) const;
  std::int32_t climb(std::ptrdiff_t g, search& state, std::int32_t max_iterations, double tolerance) const;

  std::ptrdiff_t groups_;
  std::ptrdiff_t shared_;
  std::ptrdiff_t own_;
  std::vector<sample> samples_;
};

/// What a group's search needs, allocated before the team starts.
struct mixture_fit::search {
  trial here, there;
  std::vector<double> first, second;  // one and two steps from here
};

inline double mixture_fit::trial::gain_of_all() const {
  double sum = 0.0;
  for (std::size_t i = 0; i < gain.size(); ++i) sum += coefficients[i] * gain[i];
  return sum;
}

/// The gains are the divergence's slopes, turned round: by convexity no mixture is better by more than this.
inline double mixture_fit::trial::excess() const {
  return *std::max_element(gain.begin(), gain.end()) - gain_of_all();
}

inline void mixture_fit::trial::step_to(std::vector<double>& next) const {
  const double sum = gain_of_all();
  for (std::size_t i = 0; i < gain.size(); ++i)
    next[i] = sum > 0.0 ? coefficients[i] * gain[i] / sum : coefficients[i];
}

inline void mixture_fit::evaluate_stretch(const sample& s, std::ptrdiff_t g, std::ptrdiff_t first,
                                          std::ptrdiff_t count, trial& at) const {
  alignas(64) float mixed[stretch] = {}, ratio[stretch];
  for (std::ptrdiff_t i = 0; i < shared_ + own_; ++i) {
    const auto coefficient = static_cast<float>(at.coefficients[static_cast<std::size_t>(i)]);
    const float* const row = signal_row(s, g, i) + first;
    for (std::ptrdiff_t k = 0; k < count; ++k) mixed[k] += coefficient * row[k];
  }
  const float* const goal = s.rows.data() + g * s.length + first;
  for (std::ptrdiff_t k = 0; k < count; ++k) {
    ratio[k] = goal[k] / (mixed[k] > detail::divergence_floor ? mixed[k] : detail::divergence_floor);
    mixed[k] = ratio[k] > 0.0f ? ratio[k] : 1.0f;
  }
  for (std::ptrdiff_t k = 0; k < count; ++k) mixed[k] = detail::logarithm(mixed[k]);
  at.divergence += detail::dot(goal, mixed, count);
  for (std::ptrdiff_t i = 0; i < shared_ + own_; ++i) {
    at.gain[static_cast<std::size_t>(i)] += detail::dot(ratio, signal_row(s, g, i) + first, count);
  }
}

/// The mean divergence of a group's mixture and its gains.
inline void mixture_fit::evaluate(std::ptrdiff_t g, trial& at) const {
  std::fill(at.gain.begin(), at.gain.end(), 0.0);
  at.divergence = 0.0;
  for (const sample& s : samples_) {
    for (std::ptrdiff_t first = 0; first < s.length; first += stretch) {
      evaluate_stretch(s, g, first, (std::min)(stretch, s.length - first), at);
    }
  }
  for (double& one : at.gain) one /= static_cast<double>(samples_.size());
  at.divergence /= static_cast<double>(samples_.size());
}

/// Cycles of two steps and a leap along them; a leap that does worse is taken back.
inline std::int32_t mixture_fit::climb(std::ptrdiff_t g, search& state, std::int32_t max_iterations,
                                       double tolerance) const {
  trial &here = state.here, &there = state.there;
  std::int32_t readings = 1;
  for (evaluate(g, here); here.excess() > tolerance && readings < max_iterations;) {
    here.step_to(state.first);
    there.coefficients = state.first;
    evaluate(g, there);
    ++readings;
    if (there.excess() <= tolerance || readings >= max_iterations) {
      std::swap(here, there);
      break;
    }
    there.step_to(state.second);
    double step = 0.0, bend = 0.0;
    for (std::size_t i = 0; i < state.first.size(); ++i) {
      const double r = state.first[i] - here.coefficients[i], v = state.second[i] - state.first[i] - r;
      step += r * r;
      bend += v * v;
    }
    const double leap = bend > 0.0 ? (std::max)(std::sqrt(step / bend), 1.0) : 1.0;
    double sum = 0.0;
    for (std::size_t i = 0; i < state.first.size(); ++i) {
      const double from = here.coefficients[i], r = state.first[i] - from, v = state.second[i] - state.first[i] - r;
      // a coefficient must not reach zero, where no later step could raise it
      there.coefficients[i] = (std::max)(from + 2.0 * leap * r + leap * leap * v, 0.1 * state.second[i]);
      sum += there.coefficients[i];
    }
    for (double& one : there.coefficients) one /= sum;
    const double before = here.divergence;
    evaluate(g, there);
    ++readings;
    if (!(there.divergence <= before) && readings < max_iterations) {
      there.coefficients = state.second;
      evaluate(g, there);
      ++readings;
    }
    std::swap(here, there);
  }
  return readings;
}

inline mixture_fit::result mixture_fit::solve(context<cpu>& ctx, std::int32_t max_iterations, float tolerance) const {
  detail::expects(!samples_.empty(), "mixture_fit: no samples to fit");
  const auto groups = static_cast<std::size_t>(groups_), signals = static_cast<std::size_t>(shared_ + own_);
  trial start{std::vector<double>(signals, 1.0 / static_cast<double>(signals)), std::vector<double>(signals)};
  std::vector<search> searches(groups, {start, start, start.gain, start.gain});
  std::vector<std::int32_t> readings(groups);
  ctx.parallel_for(groups_, [&](std::ptrdiff_t g, int) {
    const auto group = static_cast<std::size_t>(g);
    readings[group] = climb(g, searches[group], max_iterations, static_cast<double>(tolerance));
  });
  result found;
  for (const search& one : searches) {
    for (double c : one.here.coefficients) found.coefficients.push_back(static_cast<float>(c));
    found.divergence.push_back(static_cast<float>((std::max)(one.here.divergence, 0.0)));
    found.excess.push_back(static_cast<float>(one.here.excess()));
  }
  found.iterations = *std::max_element(readings.begin(), readings.end());
  return found;
}

}  // namespace specattn::inline v0_1
