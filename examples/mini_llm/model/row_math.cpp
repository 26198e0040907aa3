#include "row_math.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "specattn/cpu/lanes.hpp"

namespace mini_llm {

using specattn::detail::lanes;

void rms_norm(const float* x, const float* gain, double eps, std::int64_t size, float* out) {
  constexpr int chains = 16;  // a fixed number, so that the sum is the same with any vector width
  float sums[chains] = {};
  std::int64_t i = 0;
  for (; i + chains <= size; i += chains) {
    for (int c = 0; c < chains; ++c) sums[c] += x[i + c] * x[i + c];
  }
  for (; i < size; ++i) sums[i % chains] += x[i] * x[i];
  double sum = 0.0;
  for (const float part : sums) sum += static_cast<double>(part);
  const auto scale = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(size) + eps));
  for (i = 0; i < size; ++i) out[i] = x[i] * scale * gain[i];
}

void silu_multiply(const float* gate, const float* up, std::int64_t size, float* out) {
  constexpr std::int64_t block = 32;
  alignas(64) float exps[block];  // exp(-|g|), which cannot overflow
  for (std::int64_t first = 0; first < size; first += block) {
    const std::int64_t count = std::min(block, size - first);
    for (std::int64_t i = 0; i < count; ++i) exps[i] = -std::abs(gate[first + i]);
    for (std::int64_t i = 0; i < count; i += lanes::width) exp_nonpositive(lanes::load(exps + i)).store(exps + i);
    for (std::int64_t i = 0; i < count; ++i) {
      const float g = gate[first + i];
      out[first + i] = g * (g >= 0.0F ? 1.0F : exps[i]) / (1.0F + exps[i]) * up[first + i];
    }
  }
}

void rotate_head(float* x, const float* cosines, const float* sines, std::int64_t half) {
  float* const __restrict low = x;
  float* const __restrict high = x + half;
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = low[i];
    const float b = high[i];
    low[i] = a * cosines[i] - b * sines[i];
    high[i] = b * cosines[i] + a * sines[i];
  }
}

namespace {

/// How much of each pair's own frequency YaRN keeps: all of the fast pairs', none of the slow ones'.
std::vector<double> yarn_shares(const rope_config& rope, std::int64_t head_dim) {
  // The index of the pair, not whole, that turns so often in the original context.
  const auto pair_of = [&](double turns) {
    return static_cast<double>(head_dim) *
           std::log(static_cast<double>(rope.original_max_context) / (turns * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(rope.theta));
  };
  double first = pair_of(rope.ramp.fast);
  double last = pair_of(rope.ramp.slow);
  if (rope.ramp.whole_pairs) {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = std::max(first, 0.0);
  last = std::min(last, static_cast<double>(head_dim - 1));
  if (first == last) last += 0.001;  // as everybody does
  std::vector<double> shares(static_cast<std::size_t>(head_dim / 2));
  for (std::size_t i = 0; i < shares.size(); ++i) {
    shares[i] = 1.0 - std::clamp((static_cast<double>(i) - first) / (last - first), 0.0, 1.0);
  }
  return shares;
}

}  // namespace

std::vector<double> rope_frequencies(const rope_config& rope, std::int64_t head_dim) {
  std::vector<double> frequencies(static_cast<std::size_t>(head_dim / 2));
  std::vector<double> kept_shares;
  if (rope.scaling == rope_scaling::yarn) kept_shares = yarn_shares(rope, head_dim);
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    double& frequency = frequencies[i];
    frequency = std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    if (rope.scaling == rope_scaling::linear) {
      frequency /= rope.factor;
    } else if (rope.scaling == rope_scaling::llama3) {
      // Turns in the original context: few are slowed down, many kept, between the two a straight passage.
      const double turns = static_cast<double>(rope.original_max_context) * frequency / (2.0 * std::numbers::pi);
      const double kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
      const double share = std::clamp(kept, 0.0, 1.0);
      frequency *= share + (1.0 - share) / rope.factor;
    } else if (rope.scaling == rope_scaling::yarn) {
      frequency *= kept_shares[i] + (1.0 - kept_shares[i]) / rope.factor;
    }
    if (!rope.divisors.empty()) frequency /= rope.divisors[i];
  }
  return frequencies;
}

void rope_angles(std::span<const double> frequencies, std::int32_t position, float* cosines, float* sines,
                 double factor) {
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const double angle = static_cast<double>(position) * frequencies[i];
    cosines[i] = static_cast<float>(factor * std::cos(angle));
    sines[i] = static_cast<float>(factor * std::sin(angle));
  }
}

}  // namespace mini_llm
