// What a launch of select() asks of a group, and which part of it a CTA has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../../select.hpp"
#include "search.cuh"
#include "team.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// What a launch is asked for; passed by value.
template <storage T>
struct select_launch {
  weight_rows<T, cuda> from;
  selection_rule rule;
  selection_view<cuda> out;
  std::byte* workspace = nullptr;
  std::size_t group_bytes = 0;  ///< of the workspace, a group's part
};

/// A group's part of the workspace. Rows that fit a cluster's shared memory need none.
struct select_scratch_view {
  std::uint64_t* scores = nullptr;  ///< positions: rows combined
  std::uint64_t* pages = nullptr;   ///< items: mass of a row's pages, in the end of the combined rows'
  std::uint32_t* kept = nullptr;    ///< words
  std::uint32_t* equal = nullptr;   ///< words
  bool own = false;                 ///< scores and words are those of this CTA alone, in shared memory

  /// Lays the arrays out from `base`, which may be null, and returns the bytes they take.
  SPECATTN_HD std::size_t lay_out(std::byte* base, std::ptrdiff_t kv_len, bool combined, bool paged) {
    const auto items = static_cast<std::size_t>(kv_len + 31) / 32 * 32;
    std::size_t bytes = 0;
    const auto take = [&](auto*& array, std::size_t count) {
      using element = std::remove_reference_t<decltype(*array)>;
      if (count > 0 && base != nullptr) array = reinterpret_cast<element*>(base + bytes);
      bytes += (count * sizeof(element) + 63) / 64 * 64;
    };
    take(scores, combined ? items : 0);
    take(pages, paged ? items : 0);
    take(kept, items / 32);
    take(equal, items / 32);
    return bytes;
  }
};

/// Items of one member of a cluster, which are a power of two: whole words.
SPECATTN_HD inline std::int32_t member_share(std::int64_t items, int members) {
  const auto words = static_cast<std::int32_t>((items + 31) / 32);
  return (words + members - 1) / members * 32;
}
__device__ inline std::int32_t member_share(std::int32_t items, const select_team& team) {
  const auto words = static_cast<std::uint32_t>(items + 31) / 32;
  return static_cast<std::int32_t>((words + static_cast<unsigned>(team.size()) - 1) >> team.log_size()) * 32;
}

/// The lowest `count` bits; none below 0, all from 32 on.
__device__ inline std::uint32_t bits_below(std::int32_t count) {
  return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1u;
}

/// A group's facts, and this CTA's items of it.
struct group_part {
  std::int32_t length = 0;  ///< positions
  std::int32_t items = 0;   ///< positions or pages
  std::int32_t limit = 0;   ///< items that the cap and the capacity allow
  forced_items forced{};
  float top_p = 0.0f;
  std::uint32_t status = 0;
  item_range range;

  template <storage T>
  __device__ __forceinline__ group_part(const select_launch<T>& launch, const select_team& team, std::ptrdiff_t group,
                                        std::int32_t page_size) {
    const auto& [from, rule, out, workspace, group_bytes] = launch;
    const std::ptrdiff_t extent = from.weights.extent(2);
    const std::int32_t asked = from.kv_lens.empty() ? static_cast<std::int32_t>(extent) : from.kv_lens[group];
    length = clamped_length(asked, extent);
    status = asked == length ? selection_ok : selection_invalid_length;
    top_p = from.top_p.empty() ? rule.top_p : from.top_p[group];
    if (is_nan(top_p)) status |= selection_invalid_rule;
    items = item_count(length, page_size);
    limit = item_limit(rule.max_tokens, length, page_size);
    const std::int64_t capacity = out.capacity();
    const std::int64_t room = rule.output == emit::pages ? capacity : item_limit(capacity, length, page_size);
    if (room < limit) limit = static_cast<std::int32_t>(room);
    forced = forced_by(rule.sinks, rule.recent, length, page_size);
    const std::int32_t share = member_share(items, team);
    const std::int32_t first = share * team.rank();  // below 2^22 and some words
    range.first = first < items ? first : items;
    range.last = first + share < items ? first + share : items;
    range.words = (range.last - range.first + 31) / 32;
  }

  /// The forced items of a word of this CTA.
  __device__ __forceinline__ std::uint32_t forced_bits(std::int32_t word) const {
    const std::int32_t item = range.first + word * 32;
    return (bits_below(forced.head - item) | ~bits_below(forced.tail - item)) & bits_below(range.last - item);
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
