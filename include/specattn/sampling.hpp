// The mathematics of drawing and judging tokens, shared by host and device.
#pragma once

#include <cstdint>

#include "config.hpp"

namespace specattn::inline SPECATTN_DATA {

/// How a token is drawn from logits: temperature, then top-k, then top-p, then min-p, each looking at what the one
/// before it left. Truncation keeps a head of one total order, larger probability first and smaller token first
/// among equals, so that ties at a boundary are cut. The likeliest token is always kept, whatever the options.
struct sampler_options {
  float temperature = 0.0f;  ///< not above 0 (NaN included): greedy, the largest logit, ties to the smaller token
  std::int32_t top_k = 0;    ///< keep the k likeliest; <= 0: all
  float top_p = 1.0f;        ///< keep the least head whose mass is >= top_p of what top_k left; >= 1: all
  float min_p = 0.0f;        ///< drop tokens below min_p times the likeliest; <= 0: none
  std::uint64_t seed = 0;

  [[gnu::always_inline]] SPECATTN_HD constexpr bool greedy() const { return !(temperature > 0.0f); }
};

/// A token that could not be drawn: its row of logits held a NaN, +inf, or nothing but -inf. (-inf alone is a mask.)
inline constexpr std::int32_t no_token = -1;

}  // namespace specattn::inline SPECATTN_DATA

namespace specattn::inline SPECATTN_CODE {

namespace detail {

/// Weights are multiples of 2^-34 of the likeliest token's. A double adds 2^19 of them exactly, hence in any order:
/// sums, cuts and draws do not depend on threads, vector width or grid. What is dropped is below 2^-35 a token.
inline constexpr float weight_quantum = 0x1p-34f;
inline constexpr std::int64_t max_vocab = std::int64_t{1} << 19;

/// What logits are multiplied with. Bounded on both sides, so that neither 0 nor -inf times it is NaN.
SPECATTN_HD constexpr float inverse_temperature(float temperature) {
  return 1.0f / (temperature > 1e-30f ? (temperature < 1e30f ? temperature : 1e30f) : 1e-30f);
}

/// A value a row of logits can be drawn from: finite, or -inf for a masked token.
SPECATTN_HD constexpr bool usable_logit(float logit) { return logit <= 3.402823466e+38f; }

/// a * b, rounded before anything is added to it: device compilers would fuse the two and round once. (So does a host
/// compiler that is given -march with FMA and not -ffp-contract=off; its weights may then differ in the last bit.)
SPECATTN_HD inline float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

/// The float whose bits are the smaller. (Compilers keep integer minima as such, where they would turn a float's into
/// a branch that stops vectorisation.)
SPECATTN_HD constexpr float least_bits(float a, float b) {
  const std::uint32_t x = __builtin_bit_cast(std::uint32_t, a), y = __builtin_bit_cast(std::uint32_t, b);
  return __builtin_bit_cast(float, x < y ? x : y);
}

/// A number in [0, 1] to the nearest quantum. Floats from 2^-10 on are multiples of it; both sums are exact.
SPECATTN_HD inline float to_quanta(float weight) {
  const float fine = least_bits(weight, 0x1p-10f);
  return static_cast<float>(static_cast<std::int32_t>(fine * 0x1p34f + 0.5f)) * weight_quantum + (weight - fine);
}

/// How many quanta a weight has.
SPECATTN_HD constexpr std::uint64_t quanta(float weight) { return static_cast<std::uint64_t>(weight * 0x1p34f); }

/// exp((logit - largest) / temperature) to the nearest quantum, in [0, 1]. No library call: vectorises, and does
/// the same on both sides.
SPECATTN_HD inline float sampling_weight(float logit, float largest, float inverse_temperature) {
  // Of two floats that are not above zero, the bits of the greater are the smaller. exp(-25) rounds to no quantum.
  const float x = least_bits((logit - largest) * inverse_temperature, -25.0f);
  const std::int32_t n = static_cast<std::int32_t>(product(x, 1.44269504f) - 0.5f);
  const float r =
      (x - product(static_cast<float>(n), 0.693359375f)) - product(static_cast<float>(n), -2.12194440e-4f);
  float series = 1.9875691500e-4f;
  series = product(series, r) + 1.3981999507e-3f;
  series = product(series, r) + 8.3334519073e-3f;
  series = product(series, r) + 4.1665795894e-2f;
  series = product(series, r) + 1.6666665459e-1f;
  series = product(series, r) + 5.0000001201e-1f;
  series = product(series, product(r, r)) + r + 1.0f;
  return to_quanta(series * __builtin_bit_cast(float, (n + 127) << 23));
}

/// The bits of a weight order as the weights do: neither is negative.
SPECATTN_HD constexpr std::uint32_t weight_bits(float weight) { return __builtin_bit_cast(std::uint32_t, weight); }

/// Where a head of the order ends: its last token.
struct truncation {
  std::uint32_t bits = 0;
  std::int32_t token = 0x7fffffff;

  SPECATTN_HD constexpr bool keeps(std::uint32_t weight, std::int32_t candidate) const {
    return weight > bits || (weight == bits && candidate <= token);
  }
};

/// What weights of this sum are multiplied with to be probabilities.
SPECATTN_HD constexpr float probability_scale(double total) {
  return total > 0.0 ? static_cast<float>(1.0 / total) : 0.0f;
}

/// Whether a drafted token stands: with probability min(1, target / draft). A draft probability of zero means that
/// the token was not drawn from that row: it is rejected, and the residual repairs the law.
SPECATTN_HD constexpr bool accepts(double uniform, float target, float draft) {
  return draft > 0.0f && uniform * static_cast<double>(draft) < static_cast<double>(target);
}

/// What a rejected token is replaced from, unnormalised, in quanta like a weight: what is dropped is again below 2^-35 a
/// token. A draft that is NaN leaves nothing; one below zero counts as zero.
SPECATTN_HD inline float residual(float target, float draft) {
  return target > draft ? to_quanta(target - (draft > 0.0f ? draft : 0.0f)) : 0.0f;
}

}  // namespace detail
}  // namespace specattn::inline SPECATTN_CODE
