// Keys and values of earlier positions: one layout for contiguous and paged caches, and a cache that owns one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend.hpp"
#include "buffer.hpp"
#include "error.hpp"
#include "scalar.hpp"
#include "view.hpp"

namespace specattn::inline v0_1 {

/// One layer's keys and values, non-owning. Position i of cache row s, kv head h is head_dim adjacent elements at
///   keys + block_table(s, i >> page_shift) * page_stride + (i & (page_size - 1)) * position_stride + h * head_stride
/// and the same for values. A contiguous cache is one page a sequence: page_shift 31, block_table(s, 0) = s.
template <storage T, backend B = cpu>
struct kv_view {
  T* keys = nullptr;
  T* values = nullptr;
  std::ptrdiff_t page_stride = 0;
  std::ptrdiff_t position_stride = 0;
  std::ptrdiff_t head_stride = 0;
  std::int32_t page_shift = 31;                    ///< log2 of the page size; 31: one page holds everything
  view<const std::int32_t, 2, B> block_table;      ///< [cache rows, pages a sequence]
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;

  SPECATTN_HD std::ptrdiff_t offset(std::int32_t row, std::int32_t position, std::int32_t kv_head) const {
    const std::int32_t page = page_shift >= 31 ? 0 : position >> page_shift;
    const std::int32_t inside = page_shift >= 31 ? position : position & ((1 << page_shift) - 1);
    return block_table(row, page) * page_stride + inside * position_stride + kv_head * head_stride;
  }
  SPECATTN_HD T* key(std::int32_t row, std::int32_t position, std::int32_t kv_head) const {
    return keys + offset(row, position, kv_head);
  }
  SPECATTN_HD T* value(std::int32_t row, std::int32_t position, std::int32_t kv_head) const {
    return values + offset(row, position, kv_head);
  }
};

/// The size of a cache.
struct kv_cache_shape {
  std::int32_t sequences = 1;      ///< cache rows
  std::int32_t layers = 0;
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t max_positions = 0;  ///< a sequence
  std::int32_t page_size = 0;      ///< 0: contiguous; else a power of two
  std::int32_t pages = 0;          ///< paged: pages in the pool; 0: enough for every sequence at max_positions
};

namespace detail {
/// append and keep of one layer.  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
template <backend B>
struct kv_cache_impl;
void check_kv_cache_shape(const kv_cache_shape& shape);
}  // namespace detail

/// Keys and values of `sequences` cache rows over all layers, with the bookkeeping of lengths and pages on the
/// host. A sequence's length counts cached rows; its next position counts text (they part after keep()).
/// Errors leave the cache unchanged.
template <storage T, backend B = cpu>
class kv_cache {
 public:
  /// Bytes that a cache of this shape allocates, known before it is made.
  static std::size_t bytes(const kv_cache_shape& shape);

  kv_cache() = default;
  /// \throws contract_error for a shape with a non-positive or overflowing size, or a page size not a power of two
  explicit kv_cache(const kv_cache_shape& shape);

  const kv_cache_shape& shape() const { return shape_; }
  std::int32_t length(std::int32_t row) const;
  std::int32_t next_position(std::int32_t row) const;
  /// Free pages of the pool (contiguous: 0).
  std::int32_t free_pages() const { return static_cast<std::int32_t>(free_.size()); }
  /// Bytes of K and V that hold live positions (paged: whole pages).
  std::size_t bytes_in_use() const;

  /// Makes room for `count` more positions of a row, taking pages from the pool.
  /// \throws contract_error "cache full" with the numbers; nothing is taken then
  void reserve(std::int32_t row, std::int32_t count);

  /// Writes new rows of one layer behind the current length (at length(row) + at …) without changing it: every
  /// layer of a pass appends, then advance() is called once.
  /// \param k, v [count, kv_heads, head_dim] float, rounded to the storage type
  void append(context<B>& ctx, std::int32_t layer, std::int32_t row, view<const float, 3, B> k,
              view<const float, 3, B> v, std::int32_t at = 0);
  void advance(std::int32_t row, std::int32_t count);

  /// Drops the newest positions: length becomes `length`, and the pages behind it return to the pool.
  void roll_back(std::int32_t row, std::int32_t length);
  /// Empties the row and frees its pages.
  void clear(std::int32_t row);

  /// Index-based pruning: compacts the row to `positions` (strictly ascending, < length), in every layer and kv
  /// head alike, and frees the pages behind. Keys keep the rotation of their original position.
  void keep(context<B>& ctx, std::int32_t row, std::span<const std::int32_t> positions);
  /// The same with a list for each (layer, kv head): positions[(layer * kv_heads + head)]; all of one length.
  void keep(context<B>& ctx, std::int32_t row, view<const std::int32_t, 2, cpu> positions);

  kv_view<T, B> layer(std::int32_t layer) const;
};

}  // namespace specattn::inline v0_1
