// The sizes of a cache, what follows from them, and the bookkeeping of a row.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "error.hpp"
#include "view.hpp"

namespace specattn::inline SPECATTN_DATA {

/// The size of a cache.
struct kv_cache_shape {
  std::int32_t sequences = 1;  ///< cache rows
  std::int32_t layers = 0;
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t max_positions = 0;  ///< a sequence
  std::int32_t page_size = 0;      ///< 0: contiguous; else a power of two
  std::int32_t pages = 0;          ///< paged: pages in the pool; 0: enough for every sequence at max_positions
};

}  // namespace specattn::inline SPECATTN_DATA

namespace specattn::inline SPECATTN_CODE {

namespace detail {

/// a * b for sizes; throws when the product does not fit.
inline std::ptrdiff_t size_product(std::ptrdiff_t a, std::ptrdiff_t b) {
  expects(b == 0 || a <= PTRDIFF_MAX / b, "kv_cache: a size of ", a, " times ", b, " does not fit the address space");
  return a * b;
}

/// Everything that follows from a shape. Contiguous: [layer][row][kv head][position][head_dim], one page a row.
/// Paged: [layer][page][kv head][position in page][head_dim]; a page's number is the same in every layer.
struct kv_cache_layout {
  std::int32_t page_positions = 0;
  std::int32_t pages = 0;        ///< in the pool, or rows of a contiguous cache
  std::int32_t pages_a_row = 1;  ///< columns of the block table
  std::int32_t page_shift = 31;
  std::ptrdiff_t head_stride = 0;
  std::ptrdiff_t page_stride = 0;
  std::ptrdiff_t layer_stride = 0;
  std::ptrdiff_t elements = 0;  ///< of the keys; the values have as many

  explicit kv_cache_layout(const kv_cache_shape& s) {
    expects(s.sequences > 0 && s.layers > 0 && s.kv_heads > 0 && s.head_dim > 0 && s.max_positions > 0,
            "kv_cache: ", s.sequences, " sequences, ", s.layers, " layers, ", s.kv_heads, " kv_heads, head_dim ",
            s.head_dim, ", max_positions ", s.max_positions, ": all must be positive");
    expects(s.page_size >= 0 && (s.page_size & (s.page_size - 1)) == 0, "kv_cache: page_size ", s.page_size,
            " is neither 0 nor a power of two");
    expects(s.pages >= 0 && (s.pages == 0 || s.page_size > 0), "kv_cache: ", s.pages, " pages with page_size ",
            s.page_size);
    page_positions = s.page_size > 0 ? s.page_size : s.max_positions;
    std::ptrdiff_t count = s.sequences;
    if (s.page_size > 0) {
      pages_a_row = (s.max_positions - 1) / s.page_size + 1;
      page_shift = std::countr_zero(static_cast<std::uint32_t>(s.page_size));
      count = s.pages > 0 ? s.pages : size_product(s.sequences, pages_a_row);
    }
    expects(count <= INT32_MAX, "kv_cache: ", count, " pages are more than a block table can number");
    pages = static_cast<std::int32_t>(count);
    head_stride = size_product(page_positions, s.head_dim);
    page_stride = size_product(head_stride, s.kv_heads);
    layer_stride = size_product(page_stride, pages);
    elements = size_product(layer_stride, s.layers);
    size_product(elements, 2 * static_cast<std::ptrdiff_t>(sizeof(float)));  // the bytes fit too
    size_product(s.sequences, pages_a_row);
  }
};

/// One row of a cache on the host.
struct kv_cache_row {
  static constexpr std::uint64_t remembered = 8;  ///< generations whose lowest dropped position is known

  std::int32_t length = 0;
  std::int32_t next_position = 0;
  std::int32_t pages = 0;
  std::int32_t compacted = 0;                   ///< leading positions that keep() made
  std::int32_t stale_first = 0, stale_end = 0;  ///< entries of the block table not published yet
  std::uint64_t generation = 0;
  std::int32_t dropped[remembered] = {};  ///< [g % remembered] the lowest position that left in generation g

  /// Positions from `lowest` on have left their places.
  void next_generation(std::int32_t lowest) { dropped[generation++ % remembered] = lowest; }
  /// The lowest position that left since; INT32_MAX: none did.
  std::int32_t unchanged_since(std::uint64_t then) const {
    if (then > generation || generation - then > remembered) return 0;
    std::int32_t lowest = INT32_MAX;
    for (std::uint64_t g = then; g < generation; ++g) lowest = (std::min)(lowest, dropped[g % remembered]);
    return lowest;
  }
};

/// Throws unless there are `lists` lists, all ascending and below a row's length.
inline void check_kept_lists(view<const std::int32_t, 2, cpu> positions, std::ptrdiff_t lists, std::int32_t length) {
  expects(positions.extent(0) == lists, "kv_cache: keep got ", positions.extent(0), " lists, needs ", lists,
          " (layers * kv_heads)");
  const std::ptrdiff_t distinct = positions.stride(0) == 0 ? 1 : lists;
  for (std::ptrdiff_t list = 0; list < distinct; ++list) {
    std::int32_t previous = -1;
    for (std::ptrdiff_t i = 0; i < positions.extent(1); ++i) {
      const std::int32_t position = positions(list, i);
      expects(position > previous && position < length, "kv_cache: keep list ", list, " entry ", i, " is ", position,
              " after ", previous, " with length ", length);
      previous = position;
    }
  }
}

}  // namespace detail

}  // namespace specattn::inline SPECATTN_CODE
