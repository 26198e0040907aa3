// Fitting an alignment on the cpu: divergences between attention rows, and mixtures by expectation–maximisation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "../alignment.hpp"
#include "../error.hpp"
#include "../view.hpp"
#include "context.hpp"

namespace specattn::inline SPECATTN_CODE {
namespace detail {

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

}  // namespace detail

template <>
class divergence_accumulator<cpu> {
 public:
  divergence_accumulator(std::int32_t target_rows, std::int32_t draft_rows)
      : targets_(target_rows), drafts_(draft_rows) {
    detail::check_divergence_rows(targets_, drafts_);
    sums_.resize(static_cast<std::size_t>(targets_ * drafts_));
    entropies_.resize(static_cast<std::size_t>(targets_));
  }

  static std::size_t workspace_bytes(std::int32_t, std::int32_t, std::ptrdiff_t) { return 0; }

  void add(context<cpu>& ctx, view<const float, 2> target, view<const float, 2> draft) {
    const std::ptrdiff_t length = target.extent(1), rows = targets_ + drafts_;
    detail::check_divergence_sample<cpu>(targets_, drafts_, target, draft);
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
  std::vector<float> mean() const {
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

template <>
class mixture_fit<cpu> {
 public:
  mixture_fit(std::int32_t groups, std::int32_t shared_signals, std::int32_t own_signals)
      : groups_(groups), shared_(shared_signals), own_(own_signals) {
    detail::check_mixture(groups_, shared_, own_);
  }

  void add(context<cpu>&, view<const float, 2> target, view<const float, 2> shared, view<const float, 3> own) {
    const std::ptrdiff_t length = target.extent(1);
    detail::check_mixture_sample<cpu>(groups_, shared_, own_, target, shared, own);
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

  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const sample& s : samples_) sum += s.rows.size() * sizeof(float);
    return sum;
  }

  mixture_result solve(context<cpu>& ctx, std::int32_t max_iterations = 500, float tolerance = 1e-4f) const {
    detail::expects(!samples_.empty(), "mixture_fit: no samples to fit");
    std::vector<detail::mixture_search> searches(
        static_cast<std::size_t>(groups_),
        {static_cast<std::size_t>(shared_ + own_), max_iterations, static_cast<double>(tolerance)});
    ctx.parallel_for(groups_, [&](std::ptrdiff_t g, int) {
      detail::mixture_search& search = searches[static_cast<std::size_t>(g)];
      for (; !search.done(); search.take()) evaluate(g, search.pending());
    });
    return detail::collect(searches);
  }

 private:
  struct sample {
    std::ptrdiff_t length;
    std::vector<float> rows;  // targets [groups], shared signals, own signals [groups, own], each [length]
  };
  static constexpr std::ptrdiff_t stretch = 512;  // positions worked on at a time, near the registers

  const float* signal_row(const sample& s, std::ptrdiff_t g, std::ptrdiff_t i) const {
    const std::ptrdiff_t row = i < shared_ ? groups_ + i : groups_ + shared_ + g * own_ + (i - shared_);
    return s.rows.data() + row * s.length;
  }
  void evaluate(std::ptrdiff_t g, detail::mixture_trial& at) const;
  void evaluate_stretch(const sample& s, std::ptrdiff_t g, std::ptrdiff_t first, std::ptrdiff_t count,
                        detail::mixture_trial& at) const;

  std::ptrdiff_t groups_;
  std::ptrdiff_t shared_;
  std::ptrdiff_t own_;
  std::vector<sample> samples_;
};

inline void mixture_fit<cpu>::evaluate_stretch(const sample& s, std::ptrdiff_t g, std::ptrdiff_t first,
                                               std::ptrdiff_t count, detail::mixture_trial& at) const {
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
inline void mixture_fit<cpu>::evaluate(std::ptrdiff_t g, detail::mixture_trial& at) const {
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

}  // namespace specattn::inline SPECATTN_CODE
