// The target's lists of a round on the host, which rounds behind it may read again.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "buffer.hpp"
#include "decode_state.hpp"
#include "guide.hpp"
#include "selection.hpp"

namespace specattn::inline v0_1::detail {

/// Groups are (layer, sequence of the batch, kv head), layer slowest.
class kept_lists {
 public:
  kept_lists() = default;
  explicit kept_lists(const decode_sizes& sizes)
      : lists_(sizes.target_groups, sizes.positions),
        selected_(static_cast<std::size_t>(sizes.target_groups)),
        lengths_(static_cast<std::size_t>(sizes.sequences)) {}

  /// Empty lists for so many groups; what stood in them can still be grown.
  selection_view<cpu> begin(std::ptrdiff_t groups) const {
    const selection_view<cpu> kept = lists_.view().slice(0, groups);
    for (std::ptrdiff_t g = 0; g < groups; ++g) kept.counts[g] = 0;
    return kept;
  }
  /// Makes a round's lists what note() saw and every position since.
  template <storage T>
  void grow(const round_state<T, cpu>& round) const {
    const std::ptrdiff_t a_layer = std::ptrdiff_t{round.sequences()} * round.kv_heads;
    for (std::ptrdiff_t g = 0; g < round.kept.groups(); ++g) {
      const auto s = static_cast<std::size_t>(g % a_layer / round.kv_heads);
      grow_list(round.kept, g, selected_.data()[g], lengths_.data()[s], round.kv_lens[s]);
    }
  }
  /// Notes a round's lists as selected, for grow().
  template <storage T>
  void note(const round_state<T, cpu>& round) const {
    for (std::ptrdiff_t g = 0; g < round.kept.groups(); ++g) selected_.data()[g] = round.kept.counts[g];
    std::copy(round.kv_lens.begin(), round.kv_lens.end(), lengths_.data());
  }

 private:
  selection<cpu> lists_;
  buffer<std::int32_t, cpu> selected_;  // counts when they were selected
  buffer<std::int32_t, cpu> lengths_;   // [sequences] positions they were selected from
};

}  // namespace specattn::inline v0_1::detail
