// The mathematics of fitting mixtures: what a backend's readings of the samples are combined by.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "config.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Where an approximating distribution is smaller it counts as this much of its mass: a divergence stays finite.
inline constexpr float divergence_floor = 1e-10f;

/// Natural logarithm of a positive normal number, to single precision. No library call: vectorises.
SPECATTN_HD inline float logarithm(float x) {
  const auto bits = __builtin_bit_cast(std::int32_t, x);
  const std::int32_t exponent =
      (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: sqrt(1/2), below which one more halving counts
  const float f = __builtin_bit_cast(float, bits - exponent * (1 << 23)) - 1.0f, n = static_cast<float>(exponent);
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

/// A point of a group's search.
struct mixture_trial {
  std::vector<double> coefficients;
  std::vector<double> gain;  ///< what expectation–maximisation multiplies each coefficient by, not yet normalised
  double divergence = 0.0;

  double gain_of_all() const {
    double sum = 0.0;
    for (std::size_t i = 0; i < gain.size(); ++i) sum += coefficients[i] * gain[i];
    return sum;
  }
  /// The gains are the divergence's slopes, turned round: by convexity no mixture is better by more than this.
  double excess() const { return *std::max_element(gain.begin(), gain.end()) - gain_of_all(); }
  void step_to(std::vector<double>& next) const {
    const double sum = gain_of_all();
    for (std::size_t i = 0; i < gain.size(); ++i)
      next[i] = sum > 0.0 ? coefficients[i] * gain[i] / sum : coefficients[i];
  }
};

/// One group's search: cycles of two steps and a leap along them; a leap that does worse is taken back. While it is not
/// done(), a backend fills in the divergence and gains of pending() and calls take().
class mixture_search {
 public:
  mixture_search(std::size_t signals, std::int32_t max_readings, double tolerance)
      : here_{std::vector<double>(signals, 1.0 / static_cast<double>(signals)), std::vector<double>(signals)},
        there_(here_),
        first_(signals),
        second_(signals),
        max_readings_(max_readings),
        tolerance_(tolerance) {}

  bool done() const { return state_ == state::done; }
  mixture_trial& pending() { return state_ == state::start ? here_ : there_; }
  const mixture_trial& best() const { return here_; }
  std::int32_t readings() const { return readings_; }

  void take() {
    ++readings_;
    const bool spent = readings_ >= max_readings_;
    if (state_ == state::step && there_.excess() > tolerance_ && !spent) return leap();
    if (state_ == state::leap && !(there_.divergence <= here_.divergence) && !spent) {
      there_.coefficients = second_;
      state_ = state::back;
      return;
    }
    if (state_ != state::start) std::swap(here_, there_);
    if (!(here_.excess() > tolerance_) || spent) {
      state_ = state::done;
      return;
    }
    here_.step_to(first_);
    there_.coefficients = first_;
    state_ = state::step;
  }

 private:
  enum class state { start, step, leap, back, done };

  void leap() {
    there_.step_to(second_);
    double step = 0.0, bend = 0.0;
    for (std::size_t i = 0; i < first_.size(); ++i) {
      const double r = first_[i] - here_.coefficients[i], v = second_[i] - first_[i] - r;
      step += r * r;
      bend += v * v;
    }
    const double far = bend > 0.0 ? (std::max)(std::sqrt(step / bend), 1.0) : 1.0;
    double sum = 0.0;
    for (std::size_t i = 0; i < first_.size(); ++i) {
      const double from = here_.coefficients[i], r = first_[i] - from, v = second_[i] - first_[i] - r;
      // a coefficient must not reach zero, where no later step could raise it
      there_.coefficients[i] = (std::max)(from + 2.0 * far * r + far * far * v, 0.1 * second_[i]);
      sum += there_.coefficients[i];
    }
    for (double& one : there_.coefficients) one /= sum;
    state_ = state::leap;
  }

  mixture_trial here_, there_;
  std::vector<double> first_, second_;  // one and two steps from here
  std::int32_t max_readings_;
  double tolerance_;
  std::int32_t readings_ = 0;
  state state_ = state::start;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "words_end.hpp"
