// Which sequence of a ragged batch a slot belongs to.
#pragma once

#include "requirements.cuh"  // first

#include <cstddef>
#include <cstdint>

#include "../../view.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// How many of the sequences end at or before a slot: the number of the sequence it belongs to, or of sequences where it
/// belongs to none. For whole warps.
__device__ inline std::int32_t sequence_of(view<const std::int32_t, 1, cuda> slot_offsets, std::ptrdiff_t slot) {
  const auto sequences = static_cast<std::int32_t>(slot_offsets.extent(0)) - 1;
  std::uint32_t before = 0;
  for (std::int32_t s = static_cast<std::int32_t>(threadIdx.x) % 32; s < sequences; s += 32)
    before += slot_offsets[s + 1] <= slot ? 1u : 0u;
  return static_cast<std::int32_t>(__reduce_add_sync(~0u, before));
}

}  // namespace specattn::inline SPECATTN_CODE::detail
