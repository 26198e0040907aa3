// A CTA's part of an ascending list, from the bits of its threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../selection.hpp"
#include "select_search.cuh"
#include "select_team.cuh"

namespace specattn::inline v0_1::detail {

/// Stages the positions of a word's bits.
__device__ __forceinline__ void stage_word(std::uint32_t bits, std::int32_t first, std::uint32_t*& staged) {
#pragma unroll 1
  for (; bits != 0; bits &= bits - 1)
    *staged++ = static_cast<std::uint32_t>(first - 1 + __ffs(static_cast<int>(bits)));
}

/// Writes to `to` the positions of the CTA's bits, `count` of them, `at` before this thread's, whose two words begin at
/// `first`. They are staged, so that memory is written in whole lines; unless they are all of `whole`.
__device__ __forceinline__ void write_list(std::uint64_t bits, std::int32_t first, std::int32_t at,
                                           std::int32_t count, item_range whole, std::uint32_t* staged,
                                           std::int32_t* to, std::ptrdiff_t stride) {
  const std::ptrdiff_t step = select_threads * stride;
  to += select_team::thread() * stride;
  if (whole.last > whole.first) {
#pragma unroll 1
    for (std::int32_t i = whole.first + select_team::thread(); i < whole.last; i += select_threads, to += step)
      *to = i;
    return;
  }
  std::uint32_t* next = staged + at;
  stage_word(static_cast<std::uint32_t>(bits), first, next);
  stage_word(static_cast<std::uint32_t>(bits >> 32), first + 32, next);
  __syncthreads();
#pragma unroll 4
  for (std::int32_t i = select_team::thread(); i < count; i += select_threads, to += step)
    *to = static_cast<std::int32_t>(staged[i]);
}

/// Writes the padding behind a list of `count`.
__device__ __forceinline__ void pad_list(const selection_view<cuda>& out, std::ptrdiff_t group, std::int32_t count) {
  const std::ptrdiff_t stride = out.positions.stride(1);
  std::int32_t* list = out.positions.data() + group * out.positions.stride(0);
  const std::ptrdiff_t padded = padded_count(count, out.capacity());
#pragma unroll 1
  for (std::ptrdiff_t i = count + select_team::thread(); i < padded; i += select_threads) list[i * stride] = -1;
}

}  // namespace specattn::inline v0_1::detail
