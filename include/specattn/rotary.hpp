// The rotary position embedding, for caches that rotate what they are given.
#pragma once

#include <cmath>
#include <cstdint>

#include "backend.hpp"
#include "config.hpp"
#include "view.hpp"

namespace specattn::inline SPECATTN_CODE {

/// What queries and keys are rotated by (Su et al., arXiv 2104.09864), in the pairing of Hugging Face's models: element d
/// of a head's first half and element d of its second turn together by positions[slot] * inverse_frequencies[d] radians.
/// A model's scaling of long contexts is part of its frequencies.
template <backend B = cpu>
struct rotary_view {
  view<const std::int32_t, 1, B> positions;     ///< [slots] of the text: after keep() they are ahead of the cache's
  view<const float, 1, B> inverse_frequencies;  ///< [head_dim / 2]
};

namespace detail {

struct rotation {
  float cosine = 1.0f;
  float sine = 0.0f;
};

/// Whole turns are left out in double: the angle is right to float's rounding at any position.
SPECATTN_HD inline rotation rotation_at(std::int32_t position, float inverse_frequency) {
  const double turns = static_cast<double>(position) * static_cast<double>(inverse_frequency) * 0.15915494309189534;
  const auto angle = static_cast<float>((turns - std::rint(turns)) * 6.283185307179586);
  return {std::cos(angle), std::sin(angle)};
}

SPECATTN_HD inline void rotate(rotation by, float& first, float& second) {
  const float turned = first * by.cosine - second * by.sine;
  second = second * by.cosine + first * by.sine;
  first = turned;
}

}  // namespace detail

}  // namespace specattn::inline SPECATTN_CODE
