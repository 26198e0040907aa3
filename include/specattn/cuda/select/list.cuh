// A CTA's part of an ascending list, from the bits of its threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../selection.hpp"
#include "resident_memory.cuh"
#include "search.cuh"
#include "team.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// Stores to shared memory, if so: one predicated instruction, where the compiler would branch around what the value
/// takes.
__device__ __forceinline__ void store_if(bool so, std::uint16_t* to, std::uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("{\n.reg .pred so;\nsetp.ne.u32 so, %0, 0;\n@so st.shared.u16 [%1], %2;\n}" ::"r"(
                   static_cast<std::uint32_t>(so)),
               "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(to))), "h"(static_cast<std::uint16_t>(value))
               : "memory");
#else
  if (so) *to = static_cast<std::uint16_t>(value);
#endif
}

/// Stores `from` plus the number of each bit of a word, in order; four at a time, since to find one takes long.
__device__ __forceinline__ void list_bits(std::uint32_t bits, std::uint32_t from, std::uint16_t* to) {
  constexpr int together = 4;
#pragma unroll 1
  for (; bits != 0; to += together) {
    std::uint32_t lowest[together];
#pragma unroll
    for (std::uint32_t& each : lowest) {
      each = bits & (0 - bits);
      bits ^= each;
    }
#pragma unroll
    for (int i = 0; i < together; ++i)
      store_if(lowest[i] != 0, to + i, from + 31u - static_cast<std::uint32_t>(__clz(static_cast<int>(lowest[i]))));
  }
}

/// Writes to `to` the positions of the CTA's bits, `count` of them, `at` before this thread's. They are staged, as they
/// count from the CTA's first, so that memory is written in whole lines; unless they are all of the range.
template <int Words>
__device__ __forceinline__ void write_list(const own_bits<Words>& kept, std::int32_t first, std::int32_t at,
                                           std::int32_t count, item_range range, std::uint16_t* staged,
                                           std::int32_t* to, std::ptrdiff_t stride) {
  const std::ptrdiff_t step = select_threads * stride;
  to += select_team::thread() * stride;
  if (count == range.last - range.first) {
#pragma unroll 1
    for (std::int32_t i = range.first + select_team::thread(); i < range.last; i += select_threads, to += step)
      *to = i;
    return;
  }
  std::uint16_t* next = staged + at;
#pragma unroll
  for (int i = 0; i < Words; ++i) {
    list_bits(kept.words[i], static_cast<std::uint32_t>(first + i * 32), next);
    next += __popc(kept.words[i]);
  }
  __syncthreads();
#pragma unroll 4
  for (std::int32_t i = select_team::thread(); i < count; i += select_threads, to += step)
    *to = range.first + staged[i];
}

/// Writes the padding after a list of `count`.
__device__ __forceinline__ void pad_list(const selection_view<cuda>& out, std::ptrdiff_t group, std::int32_t count) {
  const std::ptrdiff_t stride = out.positions.stride(1);
  std::int32_t* list = out.positions.data() + group * out.positions.stride(0);
  const std::ptrdiff_t padded = padded_count(count, out.capacity());
#pragma unroll 1
  for (std::ptrdiff_t i = count + select_team::thread(); i < padded; i += select_threads) list[i * stride] = -1;
}

}  // namespace specattn::inline SPECATTN_CODE::detail
