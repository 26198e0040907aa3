// Query rows times a block of key rows on the CPU, for what reads keys alone.
#pragma once

#include <algorithm>

#include "../scalar.hpp"
#include "attend_tile.hpp"
#include "lanes.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int key_block = 256;  ///< positions of a task
inline constexpr int key_rows = 8;     ///< query rows at once
inline constexpr int key_depth = 64;   ///< of head_dim at a time
static_assert(key_depth % lanes::width == 0 && key_block == tile_positions);

/// scores[r][i] += q[r] · (elements [d, d + key_depth) of keys[i]), with zeros after head_dim. Keys are converted
/// once for all rows.
template <storage T>
void add_key_products(float (&scores)[key_rows][key_block], const float (&q)[key_rows][key_depth], int rows,
                      const T* const* keys, int count, int d, int head_dim) {
  const int n = (std::min)(key_depth, head_dim - d);
  const int whole = n / lanes::width * lanes::width, stride = padded_dim(n), padded = whole_groups(count);
  alignas(64) float unpacked[key_block * key_depth];
  for (int i = 0; i < count; ++i) {
    float* to = unpacked + i * stride;
    for (int c = 0; c < whole; c += lanes::width) lanes::load(keys[i] + d + c).store(to + c);
    if (whole < stride) load_first(keys[i] + d + whole, n - whole).store(to + whole);
  }
  std::fill(unpacked + count * stride, unpacked + padded * stride, 0.0f);
  alignas(64) float queries[key_rows * key_depth], sums[key_rows][key_block];
  for (int r = 0; r < rows; ++r) std::copy_n(q[r], stride, queries + r * stride);
  for (int r = 0; r < rows; r += max_scored) {
    score_rows<0>((std::min)(max_scored, rows - r), queries + r * stride, stride, rows_unpacked<0>{unpacked, stride},
                  padded, sums[r]);
  }
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < count; ++i) scores[r][i] += sums[r][i];
  }
}

}  // namespace specattn::inline SPECATTN_CODE::detail
