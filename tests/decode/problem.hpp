// Toy models, prompts and guides for the decoding loop's tests.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "specattn/decode.hpp"
#include "specattn/draft_guide.hpp"

namespace decode_testing {

using namespace specattn;  // NOLINT(google-build-using-namespace)

inline constexpr model_shape target_shape{
    .layers = 3, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .vocab = 61, .max_positions = 320, .max_slots = 96};
inline constexpr model_shape draft_shape{
    .layers = 2, .q_heads = 4, .kv_heads = 1, .head_dim = 8, .vocab = 61, .max_positions = 320, .max_slots = 96};

inline std::vector<std::int32_t> prompt_of(int length, std::uint64_t seed) {
  std::vector<std::int32_t> prompt;
  for (int i = 0; i < length; ++i) {
    prompt.push_back(static_cast<std::int32_t>(uniform(seed, static_cast<std::uint64_t>(i), random_use::emit) * 61));
  }
  return prompt;
}

/// An alignment over the toy pair: every draft head counts the same.
inline alignment flat_alignment(std::vector<std::int32_t> windows = {}, bool history = false) {
  alignment a;
  a.target = {.name = "toy", .layers = 3, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .vocab = 61};
  a.draft = {.name = "toy draft", .layers = 2, .q_heads = 4, .kv_heads = 1, .head_dim = 8, .vocab = 61};
  a.signals = {2, 4, std::move(windows), 0, history};
  const auto signals = static_cast<std::size_t>(a.signals.count());
  a.coefficients.assign(6 * signals, 1.0f / static_cast<float>(signals));
  a.mixture_divergence.assign(6, 0.1f);
  a.divergence.assign(6, 0.5f);
  a.layer_map = {0, 0, 1};
  return a;
}

inline selection_rule toy_rule(float top_p) {
  return {.top_p = top_p, .sinks = 2, .recent = 4, .rows = combine::mean};
}

}  // namespace decode_testing
