// Divergences, monotone maps and mixtures the slow way, in double. Plain loops; includes nothing of the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

namespace oracle {

using numbers = std::vector<double>;

inline numbers normalised(numbers row) {
  double mass = 0.0;
  for (double x : row) mass += x;
  for (double& x : row) x = mass > 0.0 ? x / mass : 0.0;
  return row;
}

/// KL(p ‖ q) in nats after scaling both to unit mass; q is at least 1e-10.
inline double divergence(const numbers& p, const numbers& q) {
  const numbers a = normalised(p), b = normalised(q);
  double sum = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] > 0.0) sum += a[i] * std::log(a[i] / std::max(b[i], 1e-10));
  }
  return sum;
}

/// Total cost of a map.
inline double map_cost(const std::vector<numbers>& cost, const std::vector<int>& map) {
  double sum = 0.0;
  for (std::size_t j = 0; j < map.size(); ++j) sum += cost[j][static_cast<std::size_t>(map[j])];
  return sum;
}

/// The least cost over all non-decreasing maps, each looked at.
inline double best_map_cost(const std::vector<numbers>& cost, std::vector<int> map = {}) {
  if (map.size() == cost.size()) return map_cost(cost, map);
  double best = INFINITY;
  map.push_back(map.empty() ? 0 : map.back());
  for (; map.back() < static_cast<int>(cost[0].size()); ++map.back()) best = std::min(best, best_map_cost(cost, map));
  return best;
}

/// One sample of a mixture problem: a target and its signals, all normalised.
struct mixture_sample {
  numbers target;
  std::vector<numbers> signals;
};

inline double mixture_divergence(const std::vector<mixture_sample>& samples, const numbers& coefficients) {
  double sum = 0.0;
  for (const mixture_sample& s : samples) {
    for (std::size_t i = 0; i < s.target.size(); ++i) {
      double mixed = 0.0;
      for (std::size_t k = 0; k < coefficients.size(); ++k) mixed += coefficients[k] * s.signals[k][i];
      if (s.target[i] > 0.0) sum += s.target[i] * std::log(s.target[i] / std::max(mixed, 1e-10));
    }
  }
  return sum / static_cast<double>(samples.size());
}

/// The derivative of the divergence by each coefficient.
inline numbers mixture_slopes(const std::vector<mixture_sample>& samples, const numbers& coefficients) {
  numbers slopes(coefficients.size(), 0.0);
  for (const mixture_sample& s : samples) {
    for (std::size_t i = 0; i < s.target.size(); ++i) {
      double mixed = 0.0;
      for (std::size_t k = 0; k < coefficients.size(); ++k) mixed += coefficients[k] * s.signals[k][i];
      if (mixed <= 1e-10) continue;
      for (std::size_t k = 0; k < coefficients.size(); ++k) slopes[k] -= s.target[i] * s.signals[k][i] / mixed;
    }
  }
  for (double& one : slopes) one /= static_cast<double>(samples.size());
  return slopes;
}

/// The nearest point of the simplex (Duchi et al. 2008).
inline numbers on_simplex(const numbers& point) {
  numbers sorted = point;
  std::sort(sorted.rbegin(), sorted.rend());
  double sum = 0.0, shift = 0.0;
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    sum += sorted[i];
    if (sorted[i] - (sum - 1.0) / static_cast<double>(i + 1) > 0.0) shift = (sum - 1.0) / static_cast<double>(i + 1);
  }
  numbers projected = point;
  for (double& x : projected) x = std::max(x - shift, 0.0);
  return projected;
}

/// The least divergence any mixture reaches, by projected gradients from several starts.
inline double best_mixture_divergence(const std::vector<mixture_sample>& samples, std::size_t signals) {
  std::mt19937 random(1);
  double best = INFINITY;
  for (int start = 0; start < 4; ++start) {
    numbers here(signals);
    for (double& x : here) x = start == 0 ? 1.0 : 0.05 + std::uniform_real_distribution<double>()(random);
    here = normalised(here);
    double value = mixture_divergence(samples, here), step = 0.1;
    for (int iteration = 0; iteration < 4000 && step > 1e-14; ++iteration) {
      const numbers slopes = mixture_slopes(samples, here);
      numbers next = here;
      for (std::size_t k = 0; k < signals; ++k) next[k] -= step * slopes[k];
      next = on_simplex(next);
      const double there = mixture_divergence(samples, next);
      step *= there < value ? 1.3 : 0.4;
      if (there < value) {
        here = next;
        value = there;
      }
    }
    best = std::min(best, value);
  }
  return best;
}

}  // namespace oracle
