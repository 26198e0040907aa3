// Kept positions: for each group (a sequence, layer and kv head) an ascending list of prefix positions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "buffer.hpp"
#include "error.hpp"
#include "view.hpp"

namespace specattn::inline SPECATTN_CODE {

/// What happened to a group, as flags.
enum selection_status : std::uint32_t {
  selection_ok = 0,
  selection_capped = 1,          ///< max_tokens bit: the heaviest were kept and their mass is below top_p
  selection_invalid_weight = 2,  ///< a NaN, infinite or negative weight was counted as zero
  selection_invalid_rule = 4,    ///< top_p is NaN: only the forced positions were kept
  selection_invalid_length = 8,  ///< a kv_len outside 0 … the weights' extent was clamped to it
};

/// A count that stands for "every position of the prefix", without a list. Dense layers and sequences below the
/// minimum context carry it, so that they travel in one batch with sparse ones.
inline constexpr std::int32_t keep_all = -1;

/// Entries after a list are -1 up to a whole block of this many: a reader that takes entries in blocks of up to 64
/// from the start of the list meets no stale one.
inline constexpr std::ptrdiff_t selection_block = 64;

/// Entries of a row of `positions` that are written for a list of `count`: the list, then -1 to the end of its last
/// block and, where there is room, at least one, so that a reader without the count stops.
SPECATTN_HD inline std::ptrdiff_t padded_count(std::ptrdiff_t count, std::ptrdiff_t capacity) {
  const std::ptrdiff_t blocks_end = (count / selection_block + 1) * selection_block;
  return blocks_end < capacity ? blocks_end : capacity;
}

/// Non-owning. Row g of `positions` holds counts(g) strictly ascending positions in [0, kv_len), then -1 up to
/// padded_count(); past that it is neither written nor to be read.
template <backend B = cpu>
struct selection_view {
  view<std::int32_t, 2, B> positions;  ///< [groups, capacity]
  view<std::int32_t, 1, B> counts;     ///< [groups]; keep_all or 0 … capacity
  view<float, 1, B> mass;              ///< [groups] kept share of the group's mass; may be empty
  view<std::uint32_t, 1, B> status;    ///< [groups] selection_status flags; may be empty

  SPECATTN_HD std::ptrdiff_t groups() const { return counts.extent(0); }
  SPECATTN_HD std::ptrdiff_t capacity() const { return positions.extent(1); }

  /// Groups [first, first + count).
  SPECATTN_HD selection_view slice(std::ptrdiff_t first, std::ptrdiff_t count) const {
    selection_view part = *this;
    part.positions = positions.slice(first, count);
    part.counts = counts.slice(first, count);
    if (!mass.empty()) part.mass = mass.slice(first, count);
    if (!status.empty()) part.status = status.slice(first, count);
    return part;
  }
};

namespace detail {

/// Makes group g the list of its first `count` entries and positions [first, end), which follow them, padding included.
/// A group that keeps all has no list, so none of its entries is touched. `lanes` threads may share the work, each calling
/// with its `lane`.
template <backend B>
SPECATTN_HD void grow_list(const selection_view<B>& lists, std::ptrdiff_t g, std::int32_t count, std::int32_t first,
                           std::int32_t end, std::int32_t lane = 0, std::int32_t lanes = 1) {
  std::int32_t grown = count;
  if (count != keep_all) {
    if (first < end) grown += end - first;
    const std::ptrdiff_t padded = padded_count(grown, lists.capacity());
    for (std::ptrdiff_t i = std::ptrdiff_t{count} + lane; i < padded; i += lanes)
      lists.positions(g, i) = i < grown ? first + static_cast<std::int32_t>(i - count) : -1;
  }
  if (lane == 0) lists.counts[g] = grown;
}

}  // namespace detail

/// Owning. Starts with every group empty.
template <backend B = cpu>
class selection {
 public:
  selection() = default;
  selection(std::ptrdiff_t groups, std::ptrdiff_t capacity)
      : groups_(groups),
        capacity_(capacity),
        positions_(static_cast<std::size_t>(groups * capacity)),
        counts_(static_cast<std::size_t>(groups)),
        mass_(static_cast<std::size_t>(groups)),
        status_(static_cast<std::size_t>(groups)) {}

  selection_view<B> view() const {
    return {positions_.shaped({groups_, capacity_}), counts_.shaped({groups_}), mass_.shaped({groups_}),
            status_.shaped({groups_})};
  }
  /// Bytes a selection of this shape owns.
  static std::size_t bytes(std::ptrdiff_t groups, std::ptrdiff_t capacity) {
    return static_cast<std::size_t>(groups) *
           (static_cast<std::size_t>(capacity) * sizeof(std::int32_t) + 2 * sizeof(std::int32_t) + sizeof(float));
  }

 private:
  std::ptrdiff_t groups_ = 0;
  std::ptrdiff_t capacity_ = 0;
  buffer<std::int32_t, B> positions_;
  buffer<std::int32_t, B> counts_;
  buffer<float, B> mass_;
  buffer<std::uint32_t, B> status_;
};

/// Checks one group of a host selection against the invariants above; throws contract_error naming the first
/// offence. Cost: one pass over the list.
inline void validate(const selection_view<cpu>& kept, std::ptrdiff_t group, std::int32_t kv_len) {
  const std::int32_t count = kept.counts[group];
  if (count == keep_all) return;
  detail::expects(count >= 0 && count <= kept.capacity(), "selection: group ", group, " has count ", count,
                  ", outside 0 … ", kept.capacity());
  std::int32_t previous = -1;
  for (std::int32_t i = 0; i < count; ++i) {
    const std::int32_t position = kept.positions(group, i);
    detail::expects(position > previous && position < kv_len, "selection: group ", group, " entry ", i, " is ",
                    position, " after ", previous, " with kv_len ", kv_len);
    previous = position;
  }
}

}  // namespace specattn::inline SPECATTN_CODE
