// Alignments and mixture problems that tests work on.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "oracle/alignment_oracle.hpp"
#include "specattn/alignment.hpp"

namespace alignment_testing {

/// A consistent alignment of a small pair, all fields in use.
inline specattn::alignment small_alignment() {
  specattn::alignment made;
  made.draft = {"little", 3, 2, 1, 8, 50, 77};
  made.target = {"large", 4, 4, 2, 16, 50, 0xfedcba9876543210u};
  made.signals = {3, 2, {16, 64}, 4, true};
  const auto signals = static_cast<std::size_t>(made.signals.count());
  std::mt19937 random(3);
  for (int group = 0; group < 8; ++group) {
    std::vector<double> row(signals);
    for (double& x : row) x = std::uniform_real_distribution<double>()(random);
    for (double x : oracle::normalised(row)) made.coefficients.push_back(static_cast<float>(x));
    made.mixture_divergence.push_back(0.1f * static_cast<float>(group));
  }
  made.layer_map = {0, 0, 2, 2};
  for (int i = 0; i < 12; ++i) made.divergence.push_back(0.3f + 0.01f * static_cast<float>(i));
  return made;
}

/// Samples of a mixture problem, as the library and as the oracle take them.
struct mixture_problem {
  std::int32_t groups, shared, own;
  struct one {
    std::ptrdiff_t length;
    std::vector<float> target, signals, history;  // [groups, length], [shared, length], [groups, own, length]
  };
  std::vector<one> samples;

  std::vector<oracle::mixture_sample> of_group(std::int32_t g) const {
    std::vector<oracle::mixture_sample> converted;
    for (const one& s : samples) {
      const auto row = [&s](const std::vector<float>& rows, std::int32_t r) {
        const auto first = rows.begin() + r * s.length;
        return oracle::normalised(oracle::numbers(first, first + s.length));
      };
      oracle::mixture_sample c{row(s.target, g), {}};
      for (std::int32_t i = 0; i < shared; ++i) c.signals.push_back(row(s.signals, i));
      for (std::int32_t i = 0; i < own; ++i) c.signals.push_back(row(s.history, g * own + i));
      converted.push_back(c);
    }
    return converted;
  }
};

/// Targets that are noisy mixtures of some of the signals, on samples of growing length.
inline mixture_problem random_mixture(std::int32_t groups, std::int32_t shared, std::int32_t own, int samples,
                                      std::ptrdiff_t length, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  mixture_problem problem{groups, shared, own, {}};
  std::vector<float> truth(static_cast<std::size_t>(groups * shared));
  for (float& x : truth) x = random() % 2 == 0 ? 0.0f : std::exp(2.0f * normal(random));
  for (int n = 0; n < samples; ++n) {
    const std::ptrdiff_t extent = length + 17 * n;
    const auto size = [extent](std::ptrdiff_t rows) { return static_cast<std::size_t>(rows * extent); };
    mixture_problem::one s{extent, std::vector<float>(size(groups)), std::vector<float>(size(shared)),
                           std::vector<float>(size(groups * own))};
    for (float& x : s.signals) x = std::exp(2.5f * normal(random));
    for (std::ptrdiff_t i = 0; i < groups * extent; ++i) {
      float mixed = 0.01f;
      for (std::int32_t k = 0; k < shared; ++k) {
        mixed += truth[static_cast<std::size_t>(i / extent * shared + k)] *
                 s.signals[static_cast<std::size_t>(k * extent + i % extent)];
      }
      s.target[static_cast<std::size_t>(i)] = mixed * std::exp(0.8f * normal(random));
    }
    for (float& x : s.history) x = std::exp(2.0f * normal(random));
    problem.samples.push_back(s);
  }
  return problem;
}

}  // namespace alignment_testing
