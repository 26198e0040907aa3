// A round's lists on the host, the target's or a sparse draft's, which later rounds may reuse.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "../buffer.hpp"
#include "../model.hpp"
#include "../selection.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Groups are (layer, sequence of the batch, kv head), layer slowest.
class kept_lists {
 public:
  kept_lists() = default;
  kept_lists(const model_shape& model, std::int32_t sequences, std::int32_t positions)
      : layers_(model.layers),
        kv_heads_(model.kv_heads),
        lists_(std::ptrdiff_t{layers_} * sequences * kv_heads_, positions),
        selected_(static_cast<std::size_t>(layers_ * sequences * kv_heads_)),
        lengths_(static_cast<std::size_t>(sequences)) {}

  static std::size_t bytes(const model_shape& model, std::int32_t sequences, std::int32_t positions) {
    const std::ptrdiff_t groups = std::ptrdiff_t{model.layers} * sequences * model.kv_heads;
    return selection<cpu>::bytes(groups, positions) +
           (static_cast<std::size_t>(groups) + static_cast<std::size_t>(sequences)) * sizeof(std::int32_t);
  }

  /// Those of a batch, as they stand.
  selection_view<cpu> of(std::int32_t sequences) const {
    return lists_.view().slice(0, std::ptrdiff_t{layers_} * sequences * kv_heads_);
  }
  /// Makes a sequence's lists what note() saw and every position since.
  void grow(std::int32_t s, std::int32_t sequences, std::int32_t kv_len) const {
    const selection_view<cpu> kept = of(sequences);
    for (std::int32_t layer = 0; layer < layers_; ++layer) {
      for (std::int32_t h = 0; h < kv_heads_; ++h) {
        const std::ptrdiff_t g = (std::ptrdiff_t{layer} * sequences + s) * kv_heads_ + h;
        grow_list(kept, g, selected_.data()[g], lengths_.data()[s], kv_len);
      }
    }
  }
  /// Notes a batch's lists as selected, for grow(): from the first `kv_lens` positions of its sequences.
  void note(std::span<const std::int32_t> kv_lens) const {
    const selection_view<cpu> kept = of(static_cast<std::int32_t>(kv_lens.size()));
    for (std::ptrdiff_t g = 0; g < kept.groups(); ++g) selected_.data()[g] = kept.counts[g];
    std::copy(kv_lens.begin(), kv_lens.end(), lengths_.data());
  }

 private:
  std::int32_t layers_ = 0, kv_heads_ = 0;
  selection<cpu> lists_;
  buffer<std::int32_t, cpu> selected_;  // counts when they were selected
  buffer<std::int32_t, cpu> lengths_;   // [sequences] positions they were selected from
};

}  // namespace specattn::inline SPECATTN_CODE::detail
