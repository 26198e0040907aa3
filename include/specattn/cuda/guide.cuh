// A round as a guide sees it on the device.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "../guide.hpp"
#include "context.cuh"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// What a captured round can rely on: which sequences take part is fixed, how long they are is read when the work runs.
/// Sequences are in the order of the batch; groups of `kept` are (layer, sequence, kv head), layer slowest.
template <storage T>
struct round_state<T, cuda> {
  std::span<const std::int32_t> cache_rows;        ///< [sequences] identifies a sequence from round to round
  std::int32_t max_kv_len = 0;                     ///< no prefix of this round, or of its graph's replays, is longer
  view<const std::int32_t, 1, cuda> rows;          ///< [sequences] cache_rows on the device
  view<const std::int32_t, 1, cuda> kv_lens;       ///< [sequences] prefix of the verify pass
  view<const std::int32_t, 1, cuda> slot_offsets;  ///< [sequences + 1] of the verify pass
  view<const std::int32_t, 1, cuda> fresh;     ///< [sequences] 1: the first round of what stands in this cache row
  view<const std::int32_t, 1, cuda> accepted;  ///< [sequences] valid in after_verify; -1: void
  /// As on the cpu, in multiples of recorded_unit<cuda>.
  view<const fp16, 5, cuda> draft_weights;
  view<const float, 4, cuda> draft_masses;
  view<const std::int32_t, 1, cuda> draft_steps;  ///< [sequences] draft steps, the first of which are recorded
  view<const float, 4, cuda> target_weights;
  selection_view<cuda> kept;  ///< [layers * sequences * kv_heads] the decision
  std::int32_t layers = 0;
  std::int32_t kv_heads = 0;

  std::int32_t sequences() const { return static_cast<std::int32_t>(cache_rows.size()); }
};

}  // namespace specattn::inline SPECATTN_CODE

#include "../words_end.hpp"
