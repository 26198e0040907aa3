// Fitting an alignment on the cpu: divergences between attention rows, and mixtures by expectation–maximisation.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../alignment.hpp"
#include "../error.hpp"
#include "../view.hpp"
#include "context.hpp"

namespace specattn::inline v0_1 {
namespace detail {

using float_row = Eigen::Map<Eigen::ArrayXf>;

/// Copies a row scaled to unit mass; a row without mass becomes zeros.
inline void copy_normalised(view<const float, 1> row, float* out) {
  double mass = 0.0;
  for (std::ptrdiff_t i = 0; i < row.extent(0); ++i) mass += static_cast<double>(row[i]);
  const float scale = mass > 0.0 ? static_cast<float>(1.0 / mass) : 0.0f;
  for (std::ptrdiff_t i = 0; i < row.extent(0); ++i) out[i] = scale * row[i];
}

/// Where an approximating distribution is zero it counts as this much of its mass, so that a divergence is finite.
inline constexpr float divergence_floor = 1e-10f;

/// KL(p ‖ q) in nats of two distributions over `length` positions.
inline double divergence(const float* p, const float* q, std::ptrdiff_t length) {
  double sum = 0.0;
  for (std::ptrdiff_t i = 0; i < length; ++i) {
    if (p[i] > 0.0f) sum += static_cast<double>(p[i]) * std::log(static_cast<double>(p[i]) / (std::max)(q[i], divergence_floor));
  }
  return sum;
}

}  // namespace detail

/// Mean over samples of KL(target ‖ draft) between every target row and every draft row, in nats.
/// Rows are distributions over the same positions, normalised here.
class divergence_accumulator {
 public:
  divergence_accumulator(std::int32_t target_rows, std::int32_t draft_rows)
      : targets_(target_rows), drafts_(draft_rows),
        sums_(static_cast<std::size_t>(target_rows) * static_cast<std::size_t>(draft_rows)) {}

  /// \param target [target_rows, length] \param draft [draft_rows, length]
  /// \cost  target_rows * draft_rows * length logarithms
  void add(context<cpu>& ctx, view<const float, 2> target, view<const float, 2> draft) {
    const std::ptrdiff_t length = target.extent(1);
    detail::expects(target.extent(0) == targets_ && draft.extent(0) == drafts_ && draft.extent(1) == length,
                    "divergence: rows [", target.extent(0), ", ", length, "] and [", draft.extent(0), ", ",
                    draft.extent(1), "], expected ", targets_, " and ", drafts_, " rows of one length");
    std::vector<float> rows(static_cast<std::size_t>((targets_ + drafts_) * length));
    for (std::int32_t r = 0; r < targets_ + drafts_; ++r) {
      detail::copy_normalised(r < targets_ ? target[r] : draft[r - targets_], rows.data() + r * length);
    }
    ctx.parallel_for(std::ptrdiff_t{targets_} * drafts_, [&](std::ptrdiff_t pair, int) {
      sums_[static_cast<std::size_t>(pair)] += detail::divergence(
          rows.data() + pair / drafts_ * length, rows.data() + (targets_ + pair % drafts_) * length, length);
    });
    ++samples_;
  }

  std::int64_t samples() const { return samples_; }
  std::vector<float> mean() const {  ///< [target_rows, draft_rows]
    std::vector<float> means(sums_.size());
    for (std::size_t i = 0; i < sums_.size(); ++i) {
      means[i] = samples_ > 0 ? static_cast<float>(sums_[i] / static_cast<double>(samples_)) : 0.0f;
    }
    return means;
  }

 private:
  std::ptrdiff_t targets_;
  std::ptrdiff_t drafts_;
  std::vector<double> sums_;
  std::int64_t samples_ = 0;
};

/// Fits, for each target row, the convex combination of signals with the least mean KL(target ‖ combination):
/// expectation–maximisation for mixture proportions (convex, so any start with full support reaches the optimum).
class mixture_fit {
 public:
  /// \param groups         target (layer, kv head) pairs
  /// \param shared_signals signals every group sees \param own_signals signals of each group alone (history)
  mixture_fit(std::int32_t groups, std::int32_t shared_signals, std::int32_t own_signals)
      : groups_(groups), shared_(shared_signals), own_(own_signals) {
    detail::expects(groups > 0 && shared_signals + own_signals > 0 && shared_signals >= 0 && own_signals >= 0,
                    "mixture_fit: ", groups, " groups, ", shared_signals, " shared and ", own_signals, " own signals");
  }

  /// Copies one sample. \param target [groups, length] \param shared [shared_signals, length]
  /// \param own [groups, own_signals, length], empty when own_signals is 0. Rows are normalised here.
  void add(view<const float, 2> target, view<const float, 2> shared, view<const float, 3> own) {
    const std::ptrdiff_t length = target.extent(1);
    detail::expects(target.extent(0) == groups_ && shared.extent(0) == shared_ && shared.extent(1) == length &&
                        (own_ == 0 || (own.extent(0) == groups_ && own.extent(1) == own_ && own.extent(2) == length)),
                    "mixture_fit: a sample of ", target.extent(0), " targets and ", shared.extent(0),
                    " shared signals, expected ", groups_, " and ", shared_, ", all of one length");
    sample s{length, std::vector<float>(static_cast<std::size_t>((groups_ + shared_ + groups_ * own_) * length))};
    float* out = s.rows.data();
    for (std::int32_t g = 0; g < groups_; ++g, out += length) detail::copy_normalised(target[g], out);
    for (std::int32_t i = 0; i < shared_; ++i, out += length) detail::copy_normalised(shared[i], out);
    for (std::int32_t g = 0; g < groups_; ++g) {
      for (std::int32_t i = 0; i < own_; ++i, out += length) detail::copy_normalised(own[g][i], out);
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
    std::vector<float> coefficients;  ///< [groups, shared_signals + own_signals]
    std::vector<float> divergence;    ///< [groups] nats
    std::int32_t iterations = 0;      ///< of the slowest group
  };

  /// Iterates until no group's divergence improves by more than `tolerance` nats.
  /// \cost an iteration reads every sample once for each group
  result solve(context<cpu>& ctx, std::int32_t max_iterations = 500, float tolerance = 1e-6f) const {
    detail::expects(!samples_.empty(), "mixture_fit: no samples to fit");
    const std::ptrdiff_t signals = shared_ + own_;
    result found;
    found.coefficients.assign(static_cast<std::size_t>(groups_ * signals), 1.0f / static_cast<float>(signals));
    found.divergence.assign(static_cast<std::size_t>(groups_), 0.0f);
    std::vector<std::int32_t> iterations(static_cast<std::size_t>(groups_));
    ctx.parallel_for(groups_, [&](std::ptrdiff_t g, int) {
      iterations[static_cast<std::size_t>(g)] =
          solve_group(g, found.coefficients.data() + g * signals, found.divergence[static_cast<std::size_t>(g)],
                      max_iterations, tolerance);
    });
    found.iterations = *std::max_element(iterations.begin(), iterations.end());
    return found;
  }

 private:
  struct sample {
    std::ptrdiff_t length;
    std::vector<float> rows;  // targets [groups], shared signals, own signals [groups, own], each [length]
  };

  const float* signal_row(const sample& s, std::ptrdiff_t g, std::ptrdiff_t i) const {
    const std::ptrdiff_t row = i < shared_ ? groups_ + i : groups_ + shared_ + g * own_ + (i - shared_);
    return s.rows.data() + row * s.length;
  }

  std::int32_t solve_group(std::ptrdiff_t g, float* coefficients, float& divergence, std::int32_t max_iterations,
                           float tolerance) const {
    const std::ptrdiff_t signals = shared_ + own_;
    std::vector<double> gain(static_cast<std::size_t>(signals));
    double previous = INFINITY;
    for (std::int32_t iteration = 1;; ++iteration) {
      const double now = step(g, coefficients, gain.data());
      divergence = static_cast<float>(now);
      if (iteration > max_iterations || previous - now <= static_cast<double>(tolerance)) return iteration;
      previous = now;
      double sum = 0.0;
      for (std::ptrdiff_t i = 0; i < signals; ++i) sum += coefficients[i] * gain[static_cast<std::size_t>(i)];
      for (std::ptrdiff_t i = 0; i < signals && sum > 0.0; ++i) {
        coefficients[i] = static_cast<float>(coefficients[i] * gain[static_cast<std::size_t>(i)] / sum);
      }
    }
  }

  /// The mean divergence under `coefficients`, and each signal's gain: the mean over samples of the sum of
  /// target / mixture * signal, by which its coefficient is multiplied.
  double step(std::ptrdiff_t g, const float* coefficients, double* gain) const {
    const std::ptrdiff_t signals = shared_ + own_;
    std::fill_n(gain, signals, 0.0);
    double total = 0.0;
    std::vector<float> mixture;
    for (const sample& s : samples_) {
      mixture.assign(static_cast<std::size_t>(s.length), 0.0f);
      detail::float_row mixed(mixture.data(), s.length);
      for (std::ptrdiff_t i = 0; i < signals; ++i) {
        if (coefficients[i] > 0.0f) {
          mixed += coefficients[i] * Eigen::Map<const Eigen::ArrayXf>(signal_row(s, g, i), s.length);
        }
      }
      const Eigen::Map<const Eigen::ArrayXf> target(s.rows.data() + g * s.length, s.length);
      mixed = mixed.max(detail::divergence_floor);
      total += static_cast<double>((target > 0.0f).select(target * (target / mixed).log(), 0.0f).sum());
      mixed = target / mixed;
      for (std::ptrdiff_t i = 0; i < signals; ++i) {
        gain[i] += static_cast<double>((mixed * Eigen::Map<const Eigen::ArrayXf>(signal_row(s, g, i), s.length)).sum());
      }
    }
    for (std::ptrdiff_t i = 0; i < signals; ++i) gain[i] /= static_cast<double>(samples_.size());
    return total / static_cast<double>(samples_.size());
  }

  std::ptrdiff_t groups_;
  std::ptrdiff_t shared_;
  std::ptrdiff_t own_;
  std::vector<sample> samples_;
};

}  // namespace specattn::inline v0_1
