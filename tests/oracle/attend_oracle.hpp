// Attention of one query in double precision and plain loops. Includes nothing of the library.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace oracle {

struct attended {
  std::vector<double> out;
  std::vector<double> weights;  // one a position, summing to one
  double lse = -std::numeric_limits<double>::infinity();
};

/// softmax(scale * keys · q) over the given rows, times the values. No rows: zeros, no weights, lse -inf.
inline attended attend(const std::vector<double>& q, const std::vector<std::vector<double>>& keys,
                       const std::vector<std::vector<double>>& values, double scale) {
  attended result;
  result.out.assign(q.size(), 0.0);
  double highest = -std::numeric_limits<double>::infinity();
  for (const std::vector<double>& key : keys) {
    double score = 0.0;
    for (std::size_t d = 0; d < q.size(); ++d) score += q[d] * key[d];
    result.weights.push_back(score * scale);
    if (score * scale > highest) highest = score * scale;
  }
  double sum = 0.0;
  for (double& weight : result.weights) {
    weight = std::exp(weight - highest);
    sum += weight;
  }
  if (!keys.empty()) result.lse = highest + std::log(sum);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    result.weights[i] /= sum;
    for (std::size_t d = 0; d < q.size(); ++d) result.out[d] += result.weights[i] * values[i][d];
  }
  return result;
}

}  // namespace oracle
