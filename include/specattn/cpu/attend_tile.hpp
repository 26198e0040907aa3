// The three loops of attention over one tile of positions: scores, softmax, weighted values.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../attention_state.hpp"
#include "../scalar.hpp"
#include "lanes.hpp"

namespace specattn::inline v0_1::detail {

inline constexpr int tile_positions = 256;   ///< one maximum and one softmax pass; scores of a row fill 1 KB
inline constexpr int split_positions = 512;  ///< what one state covers before states are merged in order
inline constexpr int block_rows = 64;        ///< query rows (slots * group) that share one reading of the cache
static_assert(split_positions % tile_positions == 0 && tile_positions % lanes::width == 0);

/// head_dim rounded up to whole registers: the stride of packed rows.
constexpr int padded_dim(int head_dim) { return (head_dim + lanes::width - 1) / lanes::width * lanes::width; }
constexpr int whole_groups(int positions) { return (positions + lanes::width - 1) / lanes::width * lanes::width; }
/// Positions converted to float at a time: about 8 KB, so that they, the queries and the scores share the L1 cache.
constexpr int unpack_positions(int stride) {
  return std::clamp(2048 / stride / lanes::width * lanes::width, lanes::width, tile_positions);
}

/// What one team member works in. Rows are the block's query rows, by slot and then by head of the group.
struct tile_scratch {
  float* q = nullptr;                 ///< [rows, stride] queries times the scale, zero padded
  float* scores = nullptr;            ///< [rows, tile_positions] scores, then weights relative to the row's maximum
  float* unpacked = nullptr;          ///< [unpack_positions, stride]
  std::ptrdiff_t* offsets = nullptr;  ///< [tile_positions] where each position's row starts, padded to whole groups
  std::int32_t* counts = nullptr;     ///< [rows] positions of this tile that the row attends to; ascending
  attention_state* states = nullptr;  ///< [rows] of the split
  float* sums = nullptr;              ///< [rows, stride] of the split: sum of weight * value
  int stride = 0;
};

/// Rows of a cache, converted as they are read.
template <class T>
struct rows_in_place {
  const T* base;
  const std::ptrdiff_t* offsets;
  [[gnu::always_inline]] lanes chunk(int position, int c) const {
    return lanes::load(base + offsets[position] + c * lanes::width);
  }
};
/// Rows that were converted to float before.
struct rows_unpacked {
  const float* base;
  std::ptrdiff_t stride;
  [[gnu::always_inline]] lanes chunk(int position, int c) const {
    return lanes::load(base + position * stride + c * lanes::width);
  }
};

/// Dot products of `Queries` queries with lanes::width positions. Each product runs down head_dim in `width` partial
/// sums, which are folded pairwise: the same operations for every position, query and number of queries.
template <int Chunks, int Queries, class Rows>
struct dot_products {
  const float* q;
  int stride;
  int chunks;  // used where Chunks is 0
  Rows rows;
  int first;
  using result = std::array<lanes, Queries>;

  [[gnu::always_inline]] result leaf(int position) const {
    result sum;
    for (int i = 0; i < Queries; ++i) sum[i] = lanes::zero();
    const int count = Chunks > 0 ? Chunks : chunks;
#pragma GCC unroll 16
    for (int c = 0; c < count; ++c) {
      const lanes k = rows.chunk(position, c);
#pragma GCC unroll 4
      for (int i = 0; i < Queries; ++i) sum[i] = fmadd(lanes::load(q + i * stride + c * lanes::width), k, sum[i]);
    }
    return sum;
  }
  template <int Level, int Leaf>
  [[gnu::always_inline]] result tree() const {
    if constexpr (Level == 0) {
      return leaf(first + leaf_position[Leaf]);
    } else {
      const result a = tree<Level - 1, Leaf>();
      const result b = tree<Level - 1, Leaf + (1 << (Level - 1))>();
      result sum;
#pragma GCC unroll 4
      for (int i = 0; i < Queries; ++i) sum[i] = fold<Level>(a[i], b[i]);
      return sum;
    }
  }
};

/// Scores of `Queries` rows against positions first … first + n of `rows` (whole groups of width).
template <int Chunks, int Queries, class Rows>
inline void score_rows(const tile_scratch& s, int row, Rows rows, int first, int n, int into) {
  const float* q = s.q + row * s.stride;
  float* out = s.scores + row * tile_positions + into;
  for (int p = 0; p < n; p += lanes::width) {
    const dot_products<Chunks, Queries, Rows> dots{q, s.stride, s.stride / lanes::width, rows, first + p};
    const auto sums = dots.template tree<fold_levels, 0>();
    for (int i = 0; i < Queries; ++i) sums[i].store(out + i * tile_positions + p);
  }
}

/// Adds weight * value over positions [first, last) of `rows`, in order, to `Queries` rows' sums, `Columns` registers
/// of head_dim from chunk `column` on. `weights` points at the first row's weight of position 0.
template <int Columns, int Queries, class Rows>
inline void add_values(const float* weights, Rows rows, int first, int last, int column, float* sums, int stride) {
  lanes sum[Queries][Columns];
#pragma GCC unroll 8
  for (int i = 0; i < Queries; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) sum[i][c] = lanes::load(sums + i * stride + (column + c) * lanes::width);
  for (int p = first; p < last; ++p) {
    lanes v[Columns];
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) v[c] = rows.chunk(p, column + c);
#pragma GCC unroll 8
    for (int i = 0; i < Queries; ++i) {
      const lanes w = lanes::broadcast(weights[i * tile_positions + p]);
#pragma GCC unroll 4
      for (int c = 0; c < Columns; ++c) sum[i][c] = fmadd(w, v[c], sum[i][c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Queries; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) sum[i][c].store(sums + i * stride + (column + c) * lanes::width);
}

inline constexpr int max_queries = 6;  ///< rows whose sums stay in registers together

template <int Columns, class Rows>
inline void add_values(int queries, const float* weights, Rows rows, int first, int last, int column, float* sums,
                       int stride) {
  switch (queries) {
    case 1:
      return add_values<Columns, 1>(weights, rows, first, last, column, sums, stride);
    case 2:
      return add_values<Columns, 2>(weights, rows, first, last, column, sums, stride);
    case 3:
      return add_values<Columns, 3>(weights, rows, first, last, column, sums, stride);
    case 4:
      return add_values<Columns, 4>(weights, rows, first, last, column, sums, stride);
    case 5:
      return add_values<Columns, 5>(weights, rows, first, last, column, sums, stride);
    default:
      return add_values<Columns, 6>(weights, rows, first, last, column, sums, stride);
  }
}

/// The tile kernels for one storage type and head_dim (0: any).
template <storage T, int HeadDim>
struct tile_kernel {
  static_assert(HeadDim % lanes::width == 0);
  static constexpr int chunks = HeadDim / lanes::width;
  static constexpr int register_columns = lanes::many_registers ? 4 : 2;
  static constexpr int columns = HeadDim == 0 ? register_columns : std::min(chunks, register_columns);
  int head_dim;

  /// Converting first pays when several readers follow; float needs none, an odd head_dim always needs the padding.
  static bool in_place(int readers) { return HeadDim != 0 && (std::is_same_v<T, float> || readers <= 1); }

  /// Rows offsets[first] … offsets[first + n) of `base` as floats, zero padded to the stride.
  void unpack(const tile_scratch& s, const T* base, int first, int n) const {
    for (int p = 0; p < n; ++p) {
      const T* row = base + s.offsets[first + p];
      float* to = s.unpacked + p * s.stride;
      if constexpr (HeadDim != 0) {
#pragma GCC unroll 8
        for (int c = 0; c < chunks; ++c) lanes::load(row + c * lanes::width).store(to + c * lanes::width);
      } else {
        int d = 0;
        for (; d + lanes::width <= head_dim; d += lanes::width) lanes::load(row + d).store(to + d);
        if (d < head_dim) load_first(row + d, head_dim - d).store(to + d);
      }
    }
  }

  template <class Rows>
  static void score_pairs(const tile_scratch& s, int first_row, int rows, Rows source, int first, int from, int n) {
    int row = first_row;
    for (; row + 2 <= rows; row += 2) {
      const int need = std::min(whole_groups(s.counts[row + 1]) - from, n);
      score_rows<chunks, 2>(s, row, source, first, need, from);
    }
    if (row < rows)
      score_rows<chunks, 1>(s, row, source, first, std::min(whole_groups(s.counts[row]) - from, n), from);
  }

  /// Scores of rows [first_row, rows) against the tile's n positions.
  void score(const tile_scratch& s, int first_row, int rows, const T* keys, int n) const {
    const int padded = whole_groups(n);
    if (in_place((rows - first_row + 1) / 2)) {
      score_pairs(s, first_row, rows, rows_in_place<T>{keys, s.offsets}, 0, 0, padded);
      return;
    }
    const int step = unpack_positions(s.stride);
    for (int from = 0; from < padded; from += step) {
      const int part = std::min(step, padded - from);
      unpack(s, keys, from, part);
      score_pairs(s, first_row, rows, rows_unpacked{s.unpacked, s.stride}, 0, from, part);
    }
  }

  /// Values of positions [from, to) of the tile, `source` starting at position `origin`.
  template <class Rows>
  static void add_block(const tile_scratch& s, int row, int queries, Rows source, int origin, int from, int to) {
    const int all = s.stride / lanes::width;
    const float* weights = s.scores + row * tile_positions + origin;
    float* sums = s.sums + row * s.stride;
    const auto run = [&](int q, const float* w, int first, int last, float* sum) {
      int column = 0;
      for (; column + columns <= all; column += columns)
        add_values<columns>(q, w, source, first - origin, last - origin, column, sum, s.stride);
      if constexpr (HeadDim == 0 || chunks % columns != 0) {
        for (; column < all; ++column)
          add_values<1>(q, w, source, first - origin, last - origin, column, sum, s.stride);
      }
    };
    // Positions that every row of the block attends to, then what each row has beyond: a row never touches a value
    // that it does not attend to, not even with weight zero (0 * inf).
    const int common = std::clamp(s.counts[row], from, to);
    if (common > from) run(queries, weights, from, common, sums);
    for (int i = 0; i < queries; ++i) {
      const int last = std::min(s.counts[row + i], to);
      if (last > common) run(1, weights + i * tile_positions, common, last, sums + i * s.stride);
    }
  }

  template <class Rows>
  static void add_blocks(const tile_scratch& s, int first_row, int rows, Rows source, int origin, int from, int to) {
    const int blocks = (rows - first_row + max_queries - 1) / max_queries;
    for (int b = 0, row = first_row; b < blocks; ++b) {
      const int queries = (rows - row + blocks - b - 1) / (blocks - b);
      add_block(s, row, queries, source, origin, from, to);
      row += queries;
    }
  }

  /// Adds weight * value of the tile's n positions to the sums of rows [first_row, rows).
  void add(const tile_scratch& s, int first_row, int rows, const T* values, int n) const {
    if (in_place((rows - first_row + max_queries - 1) / max_queries)) {
      add_blocks(s, first_row, rows, rows_in_place<T>{values, s.offsets}, 0, 0, n);
      return;
    }
    const int step = unpack_positions(s.stride);
    for (int from = 0; from < n; from += step) {
      const int part = std::min(step, n - from);
      unpack(s, values, from, part);
      add_blocks(s, first_row, rows, rows_unpacked{s.unpacked, s.stride}, from, from, from + part);
    }
  }
};

/// Turns a row's scores of this tile into weights relative to its maximum so far, which becomes that of the state;
/// what the state held is scaled to it.
inline void soften_row(const tile_scratch& s, int row) {
  const int n = s.counts[row];
  const int padded = whole_groups(n);
  float* scores = s.scores + row * tile_positions;
  constexpr float nothing = -std::numeric_limits<float>::infinity();
  const int last = padded - lanes::width;
  lanes::load(scores + last).first(n - last, nothing).store(scores + last);
  lanes high = lanes::load(scores);
  for (int p = lanes::width; p < padded; p += lanes::width) high = max(high, lanes::load(scores + p));

  attention_state& state = s.states[row];
  const float found = max_of_lanes(high);
  const float top = found > state.max ? found : state.max;
  const lanes base = lanes::broadcast(top == nothing ? 0.0f : top);  // every score -inf: weights 0, not NaN
  lanes total = lanes::zero();
  for (int p = 0; p < padded; p += lanes::width) {
    const lanes weight = exp_nonpositive(subtract(lanes::load(scores + p), base));
    weight.store(scores + p);
    total = add(total, weight);
  }
  float scale = 1.0f;
  if (top != state.max && state.sum != 0.0f) {
    scale = exp_nonpositive(state.max - top);
    float* sums = s.sums + row * s.stride;
    for (int d = 0; d < s.stride; d += lanes::width)
      multiply(lanes::load(sums + d), lanes::broadcast(scale)).store(sums + d);
  }
  state = {top, std::fma(state.sum, scale, sum_of_lanes(total))};
}

}  // namespace specattn::inline v0_1::detail
