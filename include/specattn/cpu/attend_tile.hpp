// The three loops of attention over one tile of positions: scores, softmax, weighted values.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../attention_state.hpp"
#include "../scalar.hpp"
#include "lanes.hpp"

#if defined(__CUDACC__)
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1675  // the host compiler knows "GCC unroll"
#endif

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int tile_positions = 256;   ///< one maximum and one softmax pass; scores of a row fill 1 KB
inline constexpr int split_positions = 512;  ///< what one state covers before states are merged in order
inline constexpr int block_rows = 64;        ///< query rows (slots * group) that share one reading of the cache
static_assert(split_positions % tile_positions == 0 && tile_positions % lanes::width == 0);

/// head_dim rounded up to whole registers: the stride of packed rows.
constexpr int padded_dim(int head_dim) { return (head_dim + lanes::width - 1) / lanes::width * lanes::width; }
constexpr int whole_groups(int positions) { return (positions + lanes::width - 1) / lanes::width * lanes::width; }
/// Positions converted to float at a time: about 8 KB, so that they, the queries and the scores share the L1 cache.
inline constexpr int unpacked_target = 2048;
constexpr int unpack_positions(int stride) {
  return std::clamp(unpacked_target / stride / lanes::width * lanes::width, lanes::width, tile_positions);
}
/// Room for them, which grows with the stride.
constexpr std::size_t unpacked_floats(int stride) {
  return static_cast<std::size_t>((std::max)(unpacked_target, lanes::width * stride));
}

/// What one team member works in. Rows are the block's query rows, by slot and then by head of the group.
struct tile_scratch {
  float* q = nullptr;                 ///< [rows, stride] queries times the scale, zero padded
  float* scores = nullptr;            ///< [rows, tile_positions] scores, then weights relative to the row's maximum
  float* unpacked = nullptr;          ///< [unpack_positions, stride]
  std::ptrdiff_t* offsets = nullptr;  ///< [tile_positions] where each position's row starts, the last repeated
  std::ptrdiff_t* next_offsets = nullptr;  ///< [tile_positions] the same of the next tile; of this one at the end
  std::int32_t* counts = nullptr;          ///< [rows] positions of this tile that the row attends to; ascending
  attention_state* states = nullptr;       ///< [rows] of the split
  float* sums = nullptr;                   ///< [rows, stride] of the split: sum of weight * value
  int stride = 0;
};

inline constexpr int max_added = 6;                               ///< rows whose sums stay in registers together
inline constexpr int max_scored = lanes::many_registers ? 4 : 2;  ///< queries that share a converted key

/// Rows of a cache, converted as they are read. Reading one fetches another that is read later: gathered rows have no
/// stride that hardware could guess, a round's working set is larger than the caches, and without this a pass waits
/// for memory most of its time.
template <class T, int HeadDim>
struct rows_in_place {
  const T* base;
  const std::ptrdiff_t* offsets;
  const T* later_base;
  const std::ptrdiff_t* later_offsets;
  [[gnu::always_inline]] lanes chunk(int position, int c) const {
    return lanes::load(base + offsets[position] + c * lanes::width);
  }
  [[gnu::always_inline]] void enter(int position) const {
    constexpr int elements_a_line = 64 / static_cast<int>(sizeof(T));
#pragma GCC unroll 8
    for (int d = 0; d < HeadDim; d += elements_a_line) __builtin_prefetch(later_base + later_offsets[position] + d);
  }
  [[gnu::always_inline]] rows_in_place from(int position) const {
    return {base, offsets + position, later_base, later_offsets + position};
  }
};
/// Rows that were converted to float before. Their stride is known to the compiler where HeadDim is: sixteen rows are
/// then one pointer and constants.
template <int HeadDim>
struct rows_unpacked {
  const float* base;
  std::ptrdiff_t any_stride;
  [[gnu::always_inline]] std::ptrdiff_t stride() const { return HeadDim > 0 ? HeadDim : any_stride; }
  [[gnu::always_inline]] lanes chunk(int position, int c) const {
    return lanes::load(base + position * stride() + c * lanes::width);
  }
  [[gnu::always_inline]] void enter(int) const {}
  [[gnu::always_inline]] rows_unpacked from(int position) const { return {base + position * stride(), any_stride}; }
};

/// Dot products of `Queries` queries with lanes::width positions. Each product runs down head_dim in `width` partial
/// sums, which are folded pairwise: the same operations for every position, query and number of queries.
template <int HeadDim, int Queries, class Rows>
struct dot_products {
  static constexpr int chunks = HeadDim / lanes::width;
  const float* q;
  std::ptrdiff_t any_stride;
  Rows rows;
  struct result {
    lanes of[std::size_t{Queries}];
  };

  [[gnu::always_inline]] lanes query(int i, int c) const {
    return lanes::load(q + i * (HeadDim > 0 ? HeadDim : any_stride) + c * lanes::width);
  }
  [[gnu::always_inline]] result leaf(int position) const {
    result sum;
    rows.enter(position);
    if constexpr (chunks > 1) {
      const lanes first = rows.chunk(position, 0);
      for (int i = 0; i < Queries; ++i) sum.of[i] = multiply(query(i, 0), first);
#pragma GCC unroll 16
      for (int c = 1; c < chunks; ++c) {
        const lanes k = rows.chunk(position, c);
        for (int i = 0; i < Queries; ++i) sum.of[i] = fmadd(query(i, c), k, sum.of[i]);
      }
    } else {  // from zero: a lone product must not meet the sums of fold() as something to fuse with
      for (int i = 0; i < Queries; ++i) sum.of[i] = lanes::zero();
      const int count = HeadDim > 0 ? chunks : static_cast<int>(any_stride) / lanes::width;
      for (int c = 0; c < count; ++c) {
        const lanes k = rows.chunk(position, c);
        for (int i = 0; i < Queries; ++i) sum.of[i] = fmadd(query(i, c), k, sum.of[i]);
      }
    }
    return sum;
  }
  /// Four positions, folded twice.
  [[gnu::always_inline]] result four() const {
    const result a = leaf(leaf_position[0]);
    const result b = leaf(leaf_position[1]);
    const result ab = fold_all<1>(a, b);
    const result c = leaf(leaf_position[2]);
    const result d = leaf(leaf_position[3]);
    return fold_all<2>(ab, fold_all<1>(c, d));
  }
  template <int Level>
  [[gnu::always_inline]] static result fold_all(const result& a, const result& b) {
    result sum;
    for (int i = 0; i < Queries; ++i) sum.of[i] = fold<Level>(a.of[i], b.of[i]);
    return sum;
  }
  /// All of a group: a loop over its quarters, because a compiler unrolls it in half the time that it takes to read
  /// it written out.
  [[gnu::always_inline]] static result of_group(const float* q, std::ptrdiff_t stride, Rows rows) {
    result part[lanes::width / 4];
#pragma GCC unroll 4
    for (int g = 0; g < lanes::width / 4; ++g)
      part[g] = dot_products{q, stride, rows.from(leaf_position[4 * g])}.four();
    if constexpr (lanes::width == 8) {
      return fold_all<3>(part[0], part[1]);
    } else {
      return fold_all<4>(fold_all<3>(part[0], part[1]), fold_all<3>(part[2], part[3]));
    }
  }
};

/// Scores of `Queries` rows of q against positions 0 … n of `rows` (whole groups of width).
template <int HeadDim, int Queries, class Rows>
inline void score_rows(const float* q, std::ptrdiff_t stride, Rows rows, int n, float* scores) {
  for (int p = 0; p < n; p += lanes::width) {
    const auto sums = dot_products<HeadDim, Queries, Rows>::of_group(q, stride, rows.from(p));
    for (int i = 0; i < Queries; ++i) sums.of[i].store(scores + i * tile_positions + p);
  }
}

template <int HeadDim, class Rows>
inline void score_rows(int queries, const float* q, std::ptrdiff_t stride, Rows rows, int n, float* scores) {
  if constexpr (max_scored > 2) {
    if (queries == 4) return score_rows<HeadDim, 4>(q, stride, rows, n, scores);
    if (queries == 3) return score_rows<HeadDim, 3>(q, stride, rows, n, scores);
  }
  if (queries == 2) return score_rows<HeadDim, 2>(q, stride, rows, n, scores);
  return score_rows<HeadDim, 1>(q, stride, rows, n, scores);
}

/// Adds weight * value over positions 0 … n of `rows`, in order, to `Queries` rows' sums, `Columns` registers of
/// head_dim from chunk `column` on. `weights` points at the first row's weight of position 0.
template <int Columns, int Queries, class Rows>
inline void add_values(const float* weights, Rows rows, int n, int column, float* sums, std::ptrdiff_t stride) {
  lanes sum[std::size_t{Queries}][std::size_t{Columns}];
#pragma GCC unroll 8
  for (int i = 0; i < Queries; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) sum[i][c] = lanes::load(sums + i * stride + (column + c) * lanes::width);
  for (int p = 0; p < n; ++p) {
    lanes v[std::size_t{Columns}];
    rows.enter(p);
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

template <int Columns, class Rows>
inline void add_values(int queries, const float* weights, Rows rows, int n, int column, float* sums,
                       std::ptrdiff_t stride) {
  switch (queries) {
    case 1:
      return add_values<Columns, 1>(weights, rows, n, column, sums, stride);
    case 2:
      return add_values<Columns, 2>(weights, rows, n, column, sums, stride);
    case 3:
      return add_values<Columns, 3>(weights, rows, n, column, sums, stride);
    case 4:
      return add_values<Columns, 4>(weights, rows, n, column, sums, stride);
    case 5:
      return add_values<Columns, 5>(weights, rows, n, column, sums, stride);
    default:
      return add_values<Columns, 6>(weights, rows, n, column, sums, stride);
  }
}

/// The tile kernels for one storage type and head_dim (0: any).
template <storage T, int HeadDim>
struct tile_kernel {
  static_assert(HeadDim % lanes::width == 0);
  static constexpr int chunks = HeadDim / lanes::width;
  static constexpr int register_columns = lanes::many_registers ? 4 : 2;
  static constexpr int columns = HeadDim == 0 ? register_columns : (std::min)(chunks, register_columns);
  int head_dim;

  /// Whether to convert rows as they are read, once for each block of queries. Storing them converted pays only for
  /// many blocks (a store costs more than a conversion); float needs neither, an odd head_dim needs the padding.
  static bool in_place(int blocks) { return HeadDim != 0 && (std::is_same_v<T, float> || blocks <= 4); }
  /// Even blocks: how many of `rows` the next of `blocks` takes.
  static int share(int rows, int blocks) { return (rows + blocks - 1) / blocks; }

  static void fetch(const T* base, const std::ptrdiff_t* offsets, int n) {
    const rows_in_place<T, HeadDim> rows{base, offsets, base, offsets};
    for (int p = 0; p < n; ++p) rows.enter(p);
  }

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

  /// Scores of rows [first_row, rows) against positions from … from + n of the tile, which are `source`'s first.
  template <class Rows>
  static void score_blocks(const tile_scratch& s, int first_row, int rows, Rows source, int from, int n) {
    int blocks = share(rows - first_row, max_scored);
    for (int row = first_row; blocks > 0; --blocks) {
      const int queries = share(rows - row, blocks);
      const int part = (std::min)(whole_groups(s.counts[row + queries - 1]) - from, n);
      float* scores = s.scores + row * tile_positions + from;
      score_rows<HeadDim>(queries, s.q + row * s.stride, s.stride, source, part, scores);
      row += queries;
    }
  }

  /// Scores of rows [first_row, rows) against the tile's n positions; fetches their values.
  void score(const tile_scratch& s, int first_row, int rows, const T* keys, const T* values, int n) const {
    const int padded = whole_groups(n);
    if (in_place(share(rows - first_row, max_scored))) {
      const rows_in_place<T, HeadDim> source{keys, s.offsets, values, s.offsets};
      score_blocks(s, first_row, rows, source, 0, padded);
      return;
    }
    const int step = unpack_positions(s.stride);
    for (int from = 0; from < padded; from += step) {
      const int part = (std::min)(step, padded - from);
      unpack(s, keys, from, part);
      const rows_unpacked<HeadDim> source{s.unpacked, s.stride};
      score_blocks(s, first_row, rows, source, from, part);
    }
  }

  /// Weighted values of positions [from, to) of the tile for `queries` rows; `source` starts at `from`.
  template <class Rows>
  static void add_block(const tile_scratch& s, int row, int queries, Rows source, int from, int to) {
    const int all = s.stride / lanes::width;
    const auto run = [&](int count, int first_query, Rows rows, int first, int n) {
      const float* weights = s.scores + (row + first_query) * tile_positions + first;
      float* sums = s.sums + (row + first_query) * s.stride;
      int column = 0;
      for (; column + columns <= all; column += columns)
        add_values<columns>(count, weights, rows, n, column, sums, s.stride);
      if constexpr (HeadDim == 0 || chunks % columns != 0) {
        for (; column < all; ++column) add_values<1>(count, weights, rows, n, column, sums, s.stride);
      }
    };
    // Positions that every row of the block attends to, then what each row has beyond: a row never touches a value
    // that it does not attend to, not even with weight zero (0 * inf).
    const int common = std::clamp(s.counts[row], from, to);
    if (common > from) run(queries, 0, source, from, common - from);
    for (int i = 0; i < queries; ++i) {
      const int last = (std::min)(s.counts[row + i], to);
      if (last > common) run(1, i, source.from(common - from), common, last - common);
    }
  }

  template <class Rows>
  static void add_blocks(const tile_scratch& s, int first_row, int rows, Rows source, int from, int to) {
    int blocks = share(rows - first_row, max_added);
    for (int row = first_row; blocks > 0; --blocks) {
      const int queries = share(rows - row, blocks);
      add_block(s, row, queries, source, from, to);
      row += queries;
    }
  }

  /// Adds weight * value of the tile's n positions to the sums of rows [first_row, rows); fetches the next tile's keys.
  void add(const tile_scratch& s, int first_row, int rows, const T* keys, const T* values, int n) const {
    if (in_place(share(rows - first_row, max_added))) {
      const rows_in_place<T, HeadDim> source{values, s.offsets, keys, s.next_offsets};
      add_blocks(s, first_row, rows, source, 0, n);
      return;
    }
    const int step = unpack_positions(s.stride);
    for (int from = 0; from < n; from += step) {
      const int part = (std::min)(step, n - from);
      unpack(s, values, from, part);
      const rows_unpacked<HeadDim> source{s.unpacked, s.stride};
      add_blocks(s, first_row, rows, source, from, from + part);
    }
  }
};

/// Turns a row's scores of this tile into weights relative to its maximum so far, which becomes that of the state;
/// what the state held is scaled to it.
[[gnu::always_inline]] inline void soften_row(const tile_scratch& s, int row) {
  const int n = s.counts[row];
  const int padded = whole_groups(n);
  float* scores = s.scores + row * tile_positions;
  constexpr float nothing = -std::numeric_limits<float>::infinity();
  const int last = padded - lanes::width;
  lanes::load(scores + last).first(n - last, nothing).store(scores + last);
  lanes high = lanes::load(scores);
  for (int p = lanes::width; p < padded; p += lanes::width) high = larger_of(high, lanes::load(scores + p));

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

}  // namespace specattn::inline SPECATTN_CODE::detail

#if defined(__CUDACC__)
#pragma nv_diagnostic pop
#endif
