// One row of logits on the CPU: its peak, its truncated distribution, a draw from it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "../sampling.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

// Loops below run over a fixed number of independent lanes: compilers turn that into vector code without being
// allowed to reorder sums, and the order of the sums does not depend on the machine.
inline constexpr std::ptrdiff_t sampling_lanes = 16;
inline constexpr std::ptrdiff_t sampling_block = 256;

struct row_peak {
  float value = 0.0f;
  std::int32_t token = no_token;  // no_token: the row has no distribution
};

inline float block_maximum(const float* row, std::ptrdiff_t count, bool& usable) {
  float largest[sampling_lanes];
  for (std::ptrdiff_t j = 0; j < sampling_lanes; ++j) largest[j] = -std::numeric_limits<float>::infinity();
  std::ptrdiff_t i = 0;
  for (; i + sampling_lanes <= count; i += sampling_lanes) {
    for (std::ptrdiff_t j = 0; j < sampling_lanes; ++j) {
      largest[j] = row[i + j] > largest[j] ? row[i + j] : largest[j];
    }
  }
  for (std::ptrdiff_t j = 0; i + j < count; ++j) largest[j] = row[i + j] > largest[j] ? row[i + j] : largest[j];
  std::int32_t unusable = 0;
  for (i = 0; i < count; ++i) unusable += usable_logit(row[i]) ? 0 : 1;
  usable = usable && unusable == 0;
  for (std::ptrdiff_t j = 1; j < sampling_lanes; ++j) largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
  return largest[0];
}

/// The largest logit and the first token that has it.
inline row_peak find_peak(const float* row, std::ptrdiff_t vocab) {
  row_peak peak{-std::numeric_limits<float>::infinity(), no_token};
  std::ptrdiff_t home = -1;
  bool usable = true;
  for (std::ptrdiff_t first = 0; first < vocab; first += sampling_block) {
    const float largest = block_maximum(row + first, (std::min)(sampling_block, vocab - first), usable);
    if (largest > peak.value) {
      peak.value = largest;
      home = first;
    }
  }
  if (!usable || home < 0) return peak;
  while (row[home] != peak.value) ++home;
  peak.token = static_cast<std::int32_t>(home);
  return peak;
}

inline double sum_weights(const float* weights, std::ptrdiff_t count) {
  double mass[sampling_lanes] = {};
  std::ptrdiff_t i = 0;
  for (; i + sampling_lanes <= count; i += sampling_lanes) {
    for (std::ptrdiff_t j = 0; j < sampling_lanes; ++j) mass[j] += static_cast<double>(weights[i + j]);
  }
  for (std::ptrdiff_t j = 0; i + j < count; ++j) mass[j] += static_cast<double>(weights[i + j]);
  for (std::ptrdiff_t j = 1; j < sampling_lanes; ++j) mass[0] += mass[j];
  return mass[0];
}

/// Sum of a row, by blocks: the walk of draw_token() meets the same partial sums.
inline double sum_row(const float* weights, std::ptrdiff_t vocab) {
  double total = 0.0;
  for (std::ptrdiff_t first = 0; first < vocab; first += sampling_block) {
    total += sum_weights(weights + first, (std::min)(sampling_block, vocab - first));
  }
  return total;
}

struct head_of_order {
  std::int64_t count = 0;
  double mass = 0.0;
};

inline std::int32_t count_head(const float* weights, std::ptrdiff_t count, float threshold) {
  std::int32_t members = 0;
  for (std::ptrdiff_t i = 0; i < count; ++i) members += weights[i] >= threshold ? 1 : 0;
  return members;
}

/// Count and mass of the weights >= threshold.
inline head_of_order measure_head(const float* weights, std::ptrdiff_t vocab, float threshold) {
  head_of_order head;
  float inside[sampling_block];
  for (std::ptrdiff_t first = 0; first < vocab; first += sampling_block) {
    const std::ptrdiff_t count = (std::min)(sampling_block, vocab - first);
    const std::int32_t members = count_head(weights + first, count, threshold);
    if (members == 0) continue;
    for (std::ptrdiff_t i = 0; i < count; ++i)
      inside[i] = weights[first + i] >= threshold ? weights[first + i] : 0.0f;
    head.count += members;
    head.mass += sum_weights(inside, count);
  }
  return head;
}

/// The first token at which the running sum exceeds `goal`; the last of positive weight where rounding denies it.
inline std::int32_t draw_token(const float* weights, std::ptrdiff_t vocab, double goal) {
  double before = 0.0;
  std::int32_t last = no_token;
  for (std::ptrdiff_t first = 0; first < vocab; first += sampling_block) {
    const std::ptrdiff_t count = (std::min)(sampling_block, vocab - first);
    const double block = sum_weights(weights + first, count);
    if (before + block <= goal && first + count < vocab) {
      before += block;
      continue;
    }
    for (std::ptrdiff_t i = first; i < first + count; ++i) {
      if (!(weights[i] > 0.0f)) continue;
      before += static_cast<double>(weights[i]);
      last = static_cast<std::int32_t>(i);
      if (before > goal) return last;
    }
  }
  for (std::ptrdiff_t i = vocab - 1; last == no_token && i >= 0; --i) {
    if (weights[i] > 0.0f) last = static_cast<std::int32_t>(i);
  }
  return last;
}

struct candidate {
  std::uint32_t bits;
  std::int32_t token;
};

/// The weights >= threshold, by ascending token.
inline std::ptrdiff_t gather_head(const float* weights, std::ptrdiff_t vocab, float threshold, candidate* out) {
  constexpr std::ptrdiff_t stretch = 64;
  std::ptrdiff_t found = 0;
  for (std::ptrdiff_t first = 0; first < vocab; first += stretch) {
    const std::ptrdiff_t end = (std::min)(first + stretch, vocab);
    if (count_head(weights + first, end - first, threshold) == 0) continue;
    for (std::ptrdiff_t i = first; i < end; ++i) {
      if (weights[i] >= threshold) out[found++] = {weight_bits(weights[i]), static_cast<std::int32_t>(i)};
    }
  }
  return found;
}

/// Narrows `candidates` (ascending tokens, all below `high` bits and at or above `low`) to the few among which the
/// goal is reached, by halving the range of their bits; `ahead` is what lies above the range.
inline std::ptrdiff_t narrow(candidate* candidates, std::ptrdiff_t count, std::uint32_t& low, std::uint32_t& high,
                             std::int64_t count_goal, double mass_goal, head_of_order& ahead) {
  constexpr std::ptrdiff_t few = 48;
  while (count > few && high - low > 1) {
    const std::uint32_t middle = low + (high - low) / 2;
    head_of_order upper = ahead;
    for (std::ptrdiff_t i = 0; i < count; ++i) {
      const bool inside = candidates[i].bits >= middle;
      upper.count += inside ? 1 : 0;
      upper.mass += static_cast<double>(inside ? __builtin_bit_cast(float, candidates[i].bits) : 0.0f);
    }
    const bool reached = upper.count >= count_goal || upper.mass >= mass_goal;
    std::ptrdiff_t left = 0;
    for (std::ptrdiff_t i = 0; i < count; ++i) {
      const candidate one = candidates[i];
      candidates[left] = one;
      left += (one.bits >= middle) == reached ? 1 : 0;
    }
    count = left;
    if (!reached) ahead = upper;
    (reached ? low : high) = middle;
  }
  return count;
}

/// The end of the shortest head of the order that has `count_goal` tokens or a mass of `mass_goal`. The default
/// truncation (keep all) where even the whole row does not.
/// \param scratch [vocab]
inline truncation find_truncation(const float* weights, std::ptrdiff_t vocab, std::int64_t count_goal,
                                  double mass_goal, candidate* scratch) {
  constexpr float steps[] = {0x1p-4f, 0x1p-8f, 0x1p-14f, weight_quantum};
  mass_goal = (std::max)(mass_goal, static_cast<double>(weight_quantum));  // at least one token
  float threshold = 0.0f;
  for (const float step : steps) {
    const head_of_order head = measure_head(weights, vocab, step);
    if (head.count < count_goal && head.mass < mass_goal) continue;
    threshold = step;
    break;
  }
  if (threshold == 0.0f) return {};
  std::ptrdiff_t count = gather_head(weights, vocab, threshold, scratch);
  std::uint32_t low = weight_bits(threshold), high = weight_bits(1.0f) + 1;
  head_of_order ahead;
  count = narrow(scratch, count, low, high, count_goal, mass_goal, ahead);
  if (high - low > 1) {  // otherwise all are equal, and in order already
    std::sort(scratch, scratch + count, [](const candidate& a, const candidate& b) {
      return a.bits != b.bits ? a.bits > b.bits : a.token < b.token;
    });
  }
  std::ptrdiff_t last = 0;
  for (; last + 1 < count; ++last) {
    ++ahead.count;
    ahead.mass += static_cast<double>(__builtin_bit_cast(float, scratch[last].bits));
    if (ahead.count >= count_goal || ahead.mass >= mass_goal) break;
  }
  return {scratch[last].bits, scratch[last].token};
}

inline void truncate_row(float* weights, std::ptrdiff_t vocab, truncation cut) {
  const float bound = __builtin_bit_cast(float, cut.bits);
  for (std::ptrdiff_t i = 0; i < vocab; ++i) {
    const float weight = weights[i];
    const bool kept = (weight > bound) | ((weight == bound) & (static_cast<std::int32_t>(i) <= cut.token));
    weights[i] = kept ? weight : 0.0f;
  }
}

/// Turns a row of logits into the weights of its truncated distribution.
/// \param logits may be `weights` itself
/// \return their sum; 0 where the row has no distribution (weights are then unspecified)
inline double make_weights(const float* logits, std::ptrdiff_t vocab, const sampler_options& options, float* weights,
                           candidate* scratch) {
  const row_peak peak = find_peak(logits, vocab);
  if (peak.token == no_token) return 0.0;
  const float inverse = inverse_temperature(options.temperature);
  for (std::ptrdiff_t i = 0; i < vocab; ++i) weights[i] = sampling_weight(logits[i], peak.value, inverse);
  if (options.top_k > 0 && options.top_k < vocab) {
    truncate_row(weights, vocab,
                 find_truncation(weights, vocab, options.top_k, std::numeric_limits<double>::infinity(), scratch));
  }
  if (options.top_p < 1.0f) {
    const double goal = static_cast<double>(options.top_p) * sum_row(weights, vocab);
    truncate_row(weights, vocab,
                 find_truncation(weights, vocab, (std::numeric_limits<std::int64_t>::max)(), goal, scratch));
  }
  if (options.min_p > 0.0f) truncate_row(weights, vocab, {weight_bits((std::min)(options.min_p, 1.0f))});
  return sum_row(weights, vocab);
}

}  // namespace specattn::inline SPECATTN_CODE::detail
