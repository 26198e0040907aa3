// The running softmax of one query row. Partial results over disjoint positions merge into the whole.
#pragma once

#include <cmath>
#include <limits>

#include "config.hpp"

namespace specattn::inline SPECATTN_CODE {

/// The maximum score seen and the sum of exp(score - max). The value vector that goes with it is the sum of
/// exp(score - max) * v, unnormalised, and stays with the caller. A default state has seen nothing: merging with
/// it changes nothing.
struct attention_state {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0.0f;
};

/// A merged state, and what each side's value vector must be multiplied by before they are added.
struct merged_state {
  attention_state state;
  float scale_a = 1.0f;
  float scale_b = 1.0f;
};

/// Cost: two exponentials. (Milakov and Gimelshein, arXiv 1805.02867.)
/// The sum is one written-out fused multiply-add: a compiler free to fuse either product could choose differently
/// from one caller to the next.
SPECATTN_HD inline merged_state merge(attention_state a, attention_state b) {
  if (b.sum == 0.0f) return {a, 1.0f, 0.0f};
  if (a.sum == 0.0f) return {b, 0.0f, 1.0f};
  const float max = a.max > b.max ? a.max : b.max;
  const float scale_a = std::exp(a.max - max);
  const float scale_b = std::exp(b.max - max);
  return {{max, std::fma(a.sum, scale_a, b.sum * scale_b)}, scale_a, scale_b};
}

/// What a state's sum and value vector are multiplied by to be relative to `max`, which is not below its own.
SPECATTN_HD inline float scale_to(attention_state s, float max) {
  return s.sum == 0.0f ? 0.0f : std::exp(s.max - max);
}

/// What the value vector is multiplied by at the end: 1 / sum, or 0 for a state that saw nothing.
SPECATTN_HD inline float finish_scale(attention_state s) { return s.sum == 0.0f ? 0.0f : 1.0f / s.sum; }

/// log of the sum of exp(score), natural; minus infinity for a state that saw nothing.
SPECATTN_HD inline float log_sum_exp(attention_state s) { return s.sum == 0.0f ? s.max : s.max + std::log(s.sum); }

}  // namespace specattn::inline SPECATTN_CODE
