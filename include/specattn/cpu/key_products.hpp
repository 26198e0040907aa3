// Query rows times a block of key rows on the CPU, for what reads keys alone.
#pragma once

#include <algorithm>

#include "../scalar.hpp"
#include "lanes.hpp"

namespace specattn::inline v0_1::detail {

inline constexpr int key_block = 256;  ///< positions of a task
inline constexpr int key_rows = 8;     ///< query rows at once
inline constexpr int key_depth = 64;   ///< of head_dim at a time
static_assert(key_depth % lanes::width == 0);

/// scores[r][i] += q[r] · (elements [d, d + key_depth) of keys[i]), zeros standing behind head_dim.
template <storage T>
void add_key_products(float (&scores)[key_rows][key_block], const float (&q)[key_rows][key_depth], int rows,
                      const T* const* keys, int count, int d, int head_dim) {
  const int n = (std::min)(key_depth, head_dim - d);
  const int whole = n / lanes::width * lanes::width;
  for (int i = 0; i < count; ++i) {
    alignas(64) float key[key_depth] = {};
    for (int c = 0; c < whole; c += lanes::width) lanes::load(keys[i] + d + c).store(key + c);
    for (int c = whole; c < n; ++c) key[c] = to_float(keys[i][d + c]);
    for (int r = 0; r < rows; ++r) {
      lanes sum = lanes::zero();
      for (int c = 0; c < key_depth; c += lanes::width) sum = fmadd(lanes::load(key + c), lanes::load(q[r] + c), sum);
      scores[r][i] += sum_of_lanes(sum);
    }
  }
}

}  // namespace specattn::inline v0_1::detail
