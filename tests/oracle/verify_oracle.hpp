// The distribution a token must be drawn from, by sorting, in double; and a chi-square bound. Plain loops; includes
// nothing of the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace oracle {

/// Which head of the order (larger logit first, smaller token first among equals) survives, as probabilities.
inline std::vector<double> sampled_law(const std::vector<float>& logits, double temperature, int top_k, double top_p,
                                       double min_p) {
  const std::size_t vocab = logits.size();
  std::vector<std::size_t> order(vocab);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return logits[a] > logits[b]; });
  const double largest = logits[order[0]];
  std::vector<double> weight(vocab);
  for (std::size_t i = 0; i < vocab; ++i) weight[i] = std::exp((logits[i] - largest) / temperature);

  std::size_t kept = vocab;
  if (top_k > 0) kept = std::min(kept, static_cast<std::size_t>(top_k));
  if (top_p < 1.0) {
    double mass = 0.0, head = 0.0;
    for (std::size_t i = 0; i < kept; ++i) mass += weight[order[i]];
    for (std::size_t i = 0; i < kept; ++i) {
      head += weight[order[i]];
      if (head >= top_p * mass) {
        kept = i + 1;
        break;
      }
    }
  }
  while (kept > 1 && weight[order[kept - 1]] < min_p) --kept;

  double total = 0.0;
  for (std::size_t i = 0; i < kept; ++i) total += weight[order[i]];
  std::vector<double> law(vocab, 0.0);
  for (std::size_t i = 0; i < kept; ++i) law[order[i]] = weight[order[i]] / total;
  return law;
}

struct chi_square {
  double statistic = 0.0;
  double bound = 0.0;       // what a true law exceeds once in ten million tests
  bool impossible = false;  // something was seen that has no probability
};

/// Counts against expected probabilities. Cells expecting fewer than five are pooled.
inline chi_square compare_law(const std::vector<long long>& counts, const std::vector<double>& law) {
  const double total = static_cast<double>(std::accumulate(counts.begin(), counts.end(), 0LL));
  chi_square result;
  double rare_seen = 0.0, rare_expected = 0.0;
  int cells = 0;
  const auto add = [&](double seen, double expected) {
    result.statistic += (seen - expected) * (seen - expected) / expected;
    ++cells;
  };
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double expected = law[i] * total;
    if (law[i] == 0.0 && counts[i] > 0) result.impossible = true;
    if (expected >= 5.0) {
      add(static_cast<double>(counts[i]), expected);
    } else {
      rare_seen += static_cast<double>(counts[i]);
      rare_expected += expected;
    }
  }
  if (rare_expected >= 1.0) add(rare_seen, rare_expected);
  const double freedom = std::max(1, cells - 1), z = 5.2;  // Wilson and Hilferty's cube
  const double cube = 1.0 - 2.0 / (9.0 * freedom) + z * std::sqrt(2.0 / (9.0 * freedom));
  result.bound = freedom * cube * cube * cube;
  return result;
}

}  // namespace oracle
