// A cache that owns the keys and values of earlier positions, contiguous or paged.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "backend.hpp"
#include "buffer.hpp"
#include "error.hpp"
#include "kv_cache_shape.hpp"
#include "kv_view.hpp"
#include "rotary.hpp"
#include "scalar.hpp"
#include "view.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

namespace detail {

/// What a backend does for a cache; the members are
///   write(ctx, layer, row, first, k, v)                              float rows into the cache, rounded
///   write(ctx, layer, layout, k, v)                                  the same for a batch; not on the cpu
///   write_rotated(ctx, layer, row, first, k, v, rotary)              the same of keys to be rotated, and rows in place;
///   rotate(ctx, q, rotary, kept_q)                                   only on the cpu
///   write_rotated(ctx, layer, layout, q, k, v, rotary, kept_q)       both for a batch; not on the cpu
///   compact(ctx, layer 0, layer stride, layers, row, positions)      kept rows to the front, in every layer and head
///   publish(ctx, entries, count, table)                              entries of the block table to where kernels read
///                                                                    it; not on the cpu
/// incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
template <backend B>
struct kv_cache_impl;

}  // namespace detail

/// Keys and values of `sequences` cache rows over all layers, with the bookkeeping of lengths and pages on the
/// host. A sequence's length counts cached rows; its next position counts text (they part after keep()).
/// Errors leave the cache unchanged, a batch's too: nothing is written and no page taken for any of its sequences.
/// Nothing is allocated after construction.
template <storage T, backend B = cpu>
class kv_cache {
 public:
  /// Bytes of keys, values and block table that a cache of this shape allocates, known before it is made. (The
  /// bookkeeping on the host adds 64 bytes a row and 4 for each page and block table entry.)
  static std::size_t bytes(const kv_cache_shape& shape) {
    const detail::kv_cache_layout layout(shape);
    return 2 * static_cast<std::size_t>(layout.elements) * sizeof(T) +
           static_cast<std::size_t>(shape.sequences) * static_cast<std::size_t>(layout.pages_a_row) *
               sizeof(std::int32_t);
  }

  kv_cache() = default;
  /// \throws contract_error for a shape with a non-positive or overflowing size, or a page size not a power of two
  explicit kv_cache(const kv_cache_shape& shape)
      : shape_(shape),
        layout_(shape),
        keys_(static_cast<std::size_t>(layout_.elements)),
        values_(static_cast<std::size_t>(layout_.elements)),
        table_(static_cast<std::size_t>(shape.sequences) * static_cast<std::size_t>(layout_.pages_a_row)),
        host_table_(table_.size(), 0),
        rows_(static_cast<std::size_t>(shape.sequences)) {
    if (!paged()) {
      for (std::int32_t row = 0; row < shape.sequences; ++row) {
        row_state& r = rows_[static_cast<std::size_t>(row)];
        set_entry(r, row, r.pages++, row);
      }
    } else {
      free_.reserve(static_cast<std::size_t>(layout_.pages));
      for (std::int32_t page = layout_.pages; page-- > 0;) free_.push_back(page);  // taken from the back: 0 first
    }
  }
  /// Of fp8_e4m3: an element is a multiple of its layer's and head's scale, so a head holds magnitudes up to 448 times
  /// that with a relative error of 2^-4 at most; larger ones are cut. A head's largest magnitude / 448 is a good scale.
  /// \param key_scales, value_scales [layers, kv_heads], positive; not copied: they must outlive the cache. Empty: 1, as
  ///                                 without them
  /// \throws contract_error as above, and for scales of another shape
  kv_cache(const kv_cache_shape& shape, view<const float, 2, B> key_scales,
           view<const float, 2, B> value_scales) requires scaled_storage<T> : kv_cache(shape) {
    for (const auto* scales : {&key_scales, &value_scales})
      detail::expects(scales->empty() || (scales->extent(0) == shape.layers && scales->extent(1) == shape.kv_heads),
                      "kv_cache: scales [", scales->extent(0), ", ", scales->extent(1), "] for ", shape.layers,
                      " layers of ", shape.kv_heads, " kv_heads");
    key_scales_ = key_scales;
    value_scales_ = value_scales;
  }

  const kv_cache_shape& shape() const { return shape_; }
  bool paged() const { return shape_.page_size > 0; }
  /// [layers, kv_heads] what stored keys are multiples of; empty: 1
  view<const float, 2, B> key_scales() const { return key_scales_; }
  /// Bytes of keys, values and block table: what bytes(shape) announced.
  std::size_t allocated_bytes() const { return keys_.bytes() + values_.bytes() + table_.bytes(); }
  std::int32_t length(std::int32_t row) const { return checked(row, "length").length; }
  std::int32_t next_position(std::int32_t row) const { return checked(row, "next_position").next_position; }
  /// Counts what dropped or moved positions of a row: roll_back(), clear(), keep(). Their places may be written anew.
  std::uint64_t generation(std::int32_t row) const { return checked(row, "generation").generation; }
  /// Positions of a row below the result hold what they held at that generation, if they were cached then. What is
  /// derived from keys, like the boxes of page_guide, stays in step by it. Exact over the last eight generations; 0 for
  /// older ones.
  std::int32_t unchanged_since(std::int32_t row, std::uint64_t generation) const {
    return (std::min)(checked(row, "unchanged_since").unchanged_since(generation), shape_.max_positions);
  }
  /// Positions that fit a row without another page.
  std::int32_t capacity(std::int32_t row) const {
    const std::int64_t room = static_cast<std::int64_t>(checked(row, "capacity").pages) * layout_.page_positions;
    return static_cast<std::int32_t>((std::min<std::int64_t>)(room, shape_.max_positions));
  }
  /// Free pages of the pool (contiguous: 0).
  std::int32_t free_pages() const { return static_cast<std::int32_t>(free_.size()); }
  /// Bytes of K and V that hold live positions (paged: whole pages).
  std::size_t bytes_in_use() const {
    std::size_t positions = 0;
    for (const row_state& r : rows_)
      positions += static_cast<std::size_t>(paged() ? r.pages : r.length) *
                   static_cast<std::size_t>(paged() ? shape_.page_size : 1);
    return 2 * sizeof(T) * positions * static_cast<std::size_t>(shape_.layers) *
           static_cast<std::size_t>(shape_.kv_heads) * static_cast<std::size_t>(shape_.head_dim);
  }

  /// Makes room for `count` more positions of a row, taking pages from the pool.
  /// \throws contract_error "cache full" with the numbers; nothing is taken then
  void reserve(std::int32_t row, std::int32_t count) {
    row_state& r = checked(row, "reserve");
    detail::expects(count >= 0 && count <= shape_.max_positions - r.length, "kv_cache: cache full: row ", row,
                    " holds ", r.length, " positions, ", count, " more were asked for, max_positions is ",
                    shape_.max_positions);
    if (!paged() || r.length + count == 0) return;
    const std::int32_t need = (r.length + count - 1) / shape_.page_size + 1 - r.pages;
    detail::expects(need <= free_pages(), "kv_cache: cache full: row ", row, " needs ", need, " more pages of ",
                    shape_.page_size, " positions, ", free_pages(), " of ", layout_.pages, " are free");
    for (std::int32_t i = 0; i < need; ++i) {
      set_entry(r, row, r.pages++, free_.back());
      free_.pop_back();
    }
  }

  /// Writes new rows of one layer after the current length (at length(row) + at …) without changing it: every
  /// layer of a pass appends, then advance() is called once. Takes pages as reserve() does where they are missing.
  /// \param k, v [count, kv_heads, head_dim] float, rounded to the storage type (nearest, ties to even), of fp8_e4m3
  ///               times 1 / the head's scale
  void append(context<B>& ctx, std::int32_t layer, std::int32_t row, view<const float, 3, B> k,
              view<const float, 3, B> v, std::int32_t at = 0) {
    check_layer(layer, "append");
    check_rows(k, v);
    const std::int32_t first = place_for(ctx, row, k.extent(0), at);
    if (k.extent(0) > 0) detail::kv_cache_impl<B>::write(ctx, this->layer(layer), row, first, k, v);
  }
  /// The same for a batch in one call, after the layout's kv_lens: \p k and \p v hold the slots of all sequences.
  /// cuda: one launch that reads the layout on the device, so that a captured graph follows it. There the pages must be
  /// reserved and published, rows of k and v beyond the last offset are left out, and a place outside the cache is not
  /// detected.
  void append(context<B>& ctx, std::int32_t layer, const pass_layout<B>& layout, view<const float, 3, B> k,
              view<const float, 3, B> v) {
    check_layer(layer, "append");
    check_rows(k, v);
    check_layout(layout);
    if constexpr (std::is_same_v<B, cpu>) {
      for_sequences(ctx, layout, k.extent(0),
                    [&](std::int32_t row, std::int32_t to, std::int32_t first, std::int32_t count) {
                      detail::kv_cache_impl<B>::write(ctx, this->layer(layer), row, to, k.slice(first, count),
                                                      v.slice(first, count));
                    });
    } else {
      publish(ctx);
      detail::kv_cache_impl<B>::write(ctx, this->layer(layer), layout, k, v);
    }
  }
  /// The same for queries and keys that are not rotated yet: keys are on their way to the cache, queries in place.
  /// cuda: still one launch, which reads the positions on the device.
  /// \param q       [slots, q_heads, head_dim], every row of which is rotated; must not overlap k or v
  /// \param k, v    [slots, kv_heads, head_dim], left as they are
  /// \param kept_q  [slots or more, q_heads, head_dim] where rotated queries go, too; empty: nowhere else
  /// \pre    head_dim is even
  void append_rotated(context<B>& ctx, std::int32_t layer, const pass_layout<B>& layout, view<float, 3, B> q,
                      view<const float, 3, B> k, view<const float, 3, B> v, const rotary_view<B>& rotary,
                      view<float, 3, B> kept_q = {}) {
    check_layer(layer, "append_rotated");
    check_rows(k, v);
    check_layout(layout);
    detail::expects(q.extent(0) == k.extent(0) && q.extent(2) == shape_.head_dim, "kv_cache: append_rotated of q [",
                    q.extent(0), ", ", q.extent(1), ", ", q.extent(2), "] with ", k.extent(0), " keys of head_dim ",
                    shape_.head_dim);
    detail::expects(shape_.head_dim % 2 == 0 && rotary.inverse_frequencies.extent(0) == shape_.head_dim / 2 &&
                        rotary.positions.extent(0) == k.extent(0),
                    "kv_cache: append_rotated by ", rotary.positions.extent(0), " positions and ",
                    rotary.inverse_frequencies.extent(0), " frequencies of ", k.extent(0), " slots, head_dim ",
                    shape_.head_dim);
    detail::expects(kept_q.empty() || (kept_q.extent(0) >= q.extent(0) && kept_q.extent(1) == q.extent(1) &&
                                       kept_q.extent(2) == q.extent(2)),
                    "kv_cache: append_rotated of q [", q.extent(0), ", ", q.extent(1), ", ", q.extent(2),
                    "] to kept_q [", kept_q.extent(0), ", ", kept_q.extent(1), ", ", kept_q.extent(2), "]");
    if constexpr (std::is_same_v<B, cpu>) {
      for_sequences(ctx, layout, k.extent(0),
                    [&](std::int32_t row, std::int32_t to, std::int32_t first, std::int32_t count) {
                      detail::kv_cache_impl<B>::write_rotated(
                          ctx, this->layer(layer), row, to, k.slice(first, count), v.slice(first, count),
                          {rotary.positions.slice(first, count), rotary.inverse_frequencies});
                    });
      detail::kv_cache_impl<B>::rotate(ctx, q, rotary,
                                       kept_q);  // last: where a sequence does not fit, q is as it was
    } else {
      publish(ctx);
      detail::kv_cache_impl<B>::write_rotated(ctx, this->layer(layer), layout, q, k, v, rotary, kept_q);
    }
  }

  /// Counts `count` appended positions in.
  void advance(std::int32_t row, std::int32_t count) {
    row_state& r = checked(row, "advance");
    detail::expects(count >= 0 && count <= capacity(row) - r.length, "kv_cache: advance of row ", row, " by ", count,
                    " beyond the ", capacity(row), " positions it has room for (length ", r.length, ")");
    r.length += count;
    r.next_position += count;
  }

  /// Drops the newest positions: length becomes `length`, and the pages after it return to the pool. Pages that
  /// were reserved beyond the length return too.
  /// \throws contract_error for a length that is negative, above the current one, or inside what keep() compacted
  ///         (there, positions of the text are no longer adjacent): clear() the row instead
  void roll_back(std::int32_t row, std::int32_t length) {
    row_state& r = checked(row, "roll_back");
    detail::expects(length >= 0 && length <= r.length, "kv_cache: roll_back of row ", row, " to ", length,
                    ", outside 0 … its length ", r.length);
    detail::expects(length >= r.compacted, "kv_cache: roll_back of row ", row, " to ", length, " inside the ",
                    r.compacted, " positions that keep() compacted");
    r.next_position -= r.length - length;
    drop_from(row, length);
  }
  /// Empties the row and frees its pages.
  void clear(std::int32_t row) {
    row_state& r = checked(row, "clear");
    r.next_position = r.compacted = 0;
    drop_from(row, 0);
  }

  /// Index-based pruning: compacts the row to `positions` (strictly ascending, < length), in every layer and kv
  /// head alike, and frees the pages after them. Keys keep the rotation of their original position.
  /// \sync cuda: queued on the context's stream; the lists are copied here and may go when the call returns
  void keep(context<B>& ctx, std::int32_t row, std::span<const std::int32_t> positions) {
    const std::ptrdiff_t lists = static_cast<std::ptrdiff_t>(shape_.layers) * shape_.kv_heads;
    const auto count = static_cast<std::ptrdiff_t>(positions.size());
    keep(ctx, row, view<const std::int32_t, 2, cpu>(positions.data(), {lists, count}, {0, 1}));
  }
  /// The same with a list for each (layer, kv head): positions[(layer * kv_heads + head)]; all of one length.
  void keep(context<B>& ctx, std::int32_t row, view<const std::int32_t, 2, cpu> positions) {
    row_state& r = checked(row, "keep");
    detail::check_kept_lists(positions, std::ptrdiff_t{shape_.layers} * shape_.kv_heads, r.length);
    publish(ctx);
    detail::kv_cache_impl<B>::compact(ctx, layer(0), layout_.layer_stride, shape_.layers, row, positions);
    r.next_generation(0);
    r.length = r.compacted = static_cast<std::int32_t>(positions.extent(1));
    free_behind(row);
  }

  kv_view<T, B> layer(std::int32_t layer) const {
    check_layer(layer, "layer");
    kv_view<T, B> result;
    result.keys = keys_.data() + layer * layout_.layer_stride;
    result.values = values_.data() + layer * layout_.layer_stride;
    result.page_stride = layout_.page_stride;
    result.position_stride = shape_.head_dim;
    result.head_stride = layout_.head_stride;
    result.page_shift = layout_.page_shift;
    result.block_table = {table_.data(), {shape_.sequences, layout_.pages_a_row}};
    result.kv_heads = shape_.kv_heads;
    result.head_dim = shape_.head_dim;
    if (!key_scales_.empty()) result.key_scales = key_scales_[layer];
    if (!value_scales_.empty()) result.value_scales = value_scales_[layer];
    return result;
  }

  /// Brings what changed of the block table to where kernels read it. append() and keep() do so themselves; a captured
  /// graph wants it called after reserve(), before capture and replay. On the cpu there is nothing to do.
  /// \sync cuda: queued on the context's stream, a launch for each run of changed entries; the entries are copied here
  void publish(context<B>& ctx) {
    if constexpr (!std::is_same_v<B, cpu>) {
      if (!stale_) return;
      std::size_t first = 0, end = 0;  // a run, over the rows' ends where they touch
      const auto send = [&] {
        if (first == end) return;
        detail::kv_cache_impl<B>::publish(ctx, host_table_.data() + first, static_cast<std::ptrdiff_t>(end - first),
                                          table_.data() + first);
      };
      for (std::int32_t row = 0; row < shape_.sequences; ++row) {
        row_state& r = rows_[static_cast<std::size_t>(row)];
        if (r.stale_end == 0) continue;
        if (entry(row, r.stale_first) != end) {
          send();
          first = entry(row, r.stale_first);
        }
        end = entry(row, r.stale_end);
        r.stale_first = r.stale_end = 0;
      }
      send();
      stale_ = false;
    }
  }

 private:
  using row_state = detail::kv_cache_row;

  const row_state& checked(std::int32_t row, const char* operation) const {
    detail::expects(row >= 0 && row < static_cast<std::int32_t>(rows_.size()), "kv_cache: ", operation, " of row ",
                    row, " of ", rows_.size());
    return rows_[static_cast<std::size_t>(row)];
  }
  row_state& checked(std::int32_t row, const char* operation) {
    return const_cast<row_state&>(std::as_const(*this).checked(row, operation));
  }
  void check_layer(std::int32_t layer, const char* operation) const {
    detail::expects(layer >= 0 && layer < shape_.layers, "kv_cache: ", operation, " of layer ", layer, " of ",
                    shape_.layers);
  }
  void check_rows(const view<const float, 3, B>& k, const view<const float, 3, B>& v) const {
    detail::expects(k.extents() == v.extents() && k.extent(1) == shape_.kv_heads && k.extent(2) == shape_.head_dim,
                    "kv_cache: append of k [", k.extent(0), ", ", k.extent(1), ", ", k.extent(2), "] and v [",
                    v.extent(0), ", ", v.extent(1), ", ", v.extent(2), "] to a cache of ", shape_.kv_heads,
                    " kv_heads, head_dim ", shape_.head_dim);
  }
  static void check_layout(const pass_layout<B>& layout) {
    detail::expects(
        layout.slot_offsets.extent(0) == layout.sequences() + 1 && layout.cache_rows.extent(0) == layout.sequences(),
        "kv_cache: append of ", layout.slot_offsets.extent(0), " slot_offsets, ", layout.sequences(), " kv_lens and ",
        layout.cache_rows.extent(0), " cache_rows");
  }
  /// Checks that rows fit after a sequence's length. Returns the pages that they need besides the row's own.
  std::int32_t pages_for(std::int32_t row, std::ptrdiff_t rows, std::int32_t at) const {
    const row_state& r = checked(row, "append");
    detail::expects(at >= 0 && rows <= shape_.max_positions - r.length - (std::min)(at, shape_.max_positions),
                    "kv_cache: cache full: row ", row, " holds ", r.length, " positions, ", rows,
                    " were appended at ", at, " behind them, max_positions is ", shape_.max_positions);
    const std::int32_t end = r.length + at + static_cast<std::int32_t>(rows);
    return rows == 0 || end <= capacity(row) ? 0 : (end - 1) / layout_.page_positions + 1 - r.pages;
  }
  /// Makes room for them. Returns the place of the first.
  std::int32_t place_for(context<B>& ctx, std::int32_t row, std::ptrdiff_t rows, std::int32_t at) {
    if (pages_for(row, rows, at) > 0) reserve(row, at + static_cast<std::int32_t>(rows));
    publish(ctx);
    return length(row) + at;
  }
  /// Refuses a layout unless all of its sequences fit, before the first of them takes a page.
  void check_room(const pass_layout<B>& layout, std::ptrdiff_t slots) const {
    std::int64_t need = 0;
    for (std::int32_t s = 0; s < layout.sequences(); ++s) {
      const std::int32_t row = layout.cache_rows[s], first = layout.slot_offsets[s],
                         last = layout.slot_offsets[s + 1];
      if (last <= first) continue;
      detail::expects(first >= 0 && last <= slots, "kv_cache: append of slots ", first, " … ", last, " of ", slots,
                      " by sequence ", s);
      need += pages_for(row, last - first, layout.kv_lens[s] - length(row));
    }
    detail::expects(need <= free_pages(), "kv_cache: cache full: ", layout.sequences(), " sequences need ", need,
                    " more pages of ", shape_.page_size, " positions, ", free_pages(), " of ", layout_.pages,
                    " are free");
  }
  /// one(row, place, first slot, slots) for each sequence that has slots.
  template <class One>
  void for_sequences(context<B>& ctx, const pass_layout<B>& layout, std::ptrdiff_t slots, One one) {
    check_room(layout, slots);
    for (std::int32_t s = 0; s < layout.sequences(); ++s) {
      const std::int32_t row = layout.cache_rows[s], first = layout.slot_offsets[s];
      const std::int32_t count = layout.slot_offsets[s + 1] - first;
      if (count > 0) one(row, place_for(ctx, row, count, layout.kv_lens[s] - length(row)), first, count);
    }
  }
  std::size_t entry(std::int32_t row, std::int32_t page) const {
    return static_cast<std::size_t>(row) * static_cast<std::size_t>(layout_.pages_a_row) +
           static_cast<std::size_t>(page);
  }
  /// Positions from `length` on are no longer cached.
  void drop_from(std::int32_t row, std::int32_t length) {
    row_state& r = rows_[static_cast<std::size_t>(row)];
    if (length < r.length) r.next_generation(length);
    r.length = length;
    free_behind(row);
  }
  void free_behind(std::int32_t row) {
    if (!paged()) return;
    row_state& r = rows_[static_cast<std::size_t>(row)];
    const std::int32_t needed = r.length == 0 ? 0 : (r.length - 1) / shape_.page_size + 1;
    while (r.pages > needed) free_.push_back(host_table_[entry(row, --r.pages)]);
  }
  /// On the cpu, kernels read the table as it is.
  void set_entry(row_state& r, std::int32_t row, std::int32_t page, std::int32_t number) {
    host_table_[entry(row, page)] = number;
    if constexpr (std::is_same_v<B, cpu>) {
      table_.data()[entry(row, page)] = number;
    } else {
      if (r.stale_end == 0 || page < r.stale_first) r.stale_first = page;
      r.stale_end = (std::max)(r.stale_end, page + 1);
      stale_ = true;
    }
  }

  kv_cache_shape shape_{.sequences = 0};
  detail::kv_cache_layout layout_{kv_cache_shape{1, 1, 1, 1, 1}};
  buffer<T, B> keys_;
  buffer<T, B> values_;
  view<const float, 2, B> key_scales_;
  view<const float, 2, B> value_scales_;
  buffer<std::int32_t, B> table_;
  std::vector<std::int32_t> host_table_;
  std::vector<row_state> rows_;
  std::vector<std::int32_t> free_;
  bool stale_ = false;  // some row has entries that are not published
};

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
