// A lone row on its way into shared memory: its keys, and what must be known before they are summed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../../scalar.hpp"
#include "../device/copy.cuh"
#include "resident_memory.cuh"
#include "search.cuh"
#include "team.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

__device__ __forceinline__ std::uint32_t larger(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  return __vimax3_u32(a, b, c);
}

/// Reads the CTA's part of the row, zeros to the end of its last word. Weights that are not valid have larger keys than
/// any that are.
template <storage T>
__device__ __forceinline__ key_facts read_row(const T* row, std::ptrdiff_t stride, item_range range,
                                              row_keys<T> keys) {
  using weights = typename row_keys<T>::weights;
  constexpr int group = row_keys<T>::group;
  constexpr int step = select_threads * group;
  static_assert(step % 1024 == 0);
  const int thread = select_team::thread();
  const std::int32_t count = range.last - range.first;
  const std::int32_t end = range.words * 32;
  T* own = keys.base + keys.place_of(thread * group);
  row += thread * group * stride;
  std::int32_t i = thread * group;
  if (stride == 1 && reinterpret_cast<std::uintptr_t>(row) % sizeof(weights) == 0) {
    const T* from = row;
    T* to = own;
#pragma unroll 8
    for (; i + group <= count; i += step, from += step, to += step) copy_16_bytes(to, from);
  }
  // The groups that are not whole: of aligned rows one of a thread at most.
#pragma unroll 1
  for (; i < end; i += step) {
    weights part = {};
#pragma unroll
    for (int j = 0; j < group; ++j) {
      if (i + j < count) part.x[j] = row[(i - thread * group + j) * stride];
    }
    *reinterpret_cast<weights*>(own + i - thread * group) = part;
  }
  await_all_copies();
  key_facts facts{0, 0.0f};
#pragma unroll 4
  for (i = 0; i < end - thread * group; i += step) {
    const weights part = *reinterpret_cast<const weights*>(own + i);
#pragma unroll
    for (int j = 0; j < group; j += 4) {
      float weight[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) weight[n] = to_float(part.x[j + n]);
      facts.max_key = larger(facts.max_key, __float_as_uint(weight[0]), __float_as_uint(weight[1]));
      facts.max_key = larger(facts.max_key, __float_as_uint(weight[2]), __float_as_uint(weight[3]));
      facts.sum += (weight[0] + weight[1]) + (weight[2] + weight[3]);
    }
  }
  return facts;
}

/// The largest key and the sum over the cluster, the same to the bit in every CTA.
__device__ __forceinline__ key_facts exchange_facts(const select_team& team, select_row_memory& memory, int turn,
                                                    key_facts mine) {
  const auto over_lanes = [](key_facts all, int lanes) {
    all.max_key = __reduce_max_sync(~0u, all.max_key);
    for (int distance = 1; distance < lanes; distance *= 2) all.sum += __shfl_xor_sync(~0u, all.sum, distance);
    return all;
  };
  mine = over_lanes(mine, 32);
  if (team.lane() == 0) memory.warps[team.warp()] = {mine.max_key, __float_as_uint(mine.sum)};
  __syncthreads();
  uint2 part = memory.warps[team.lane() % select_warps];
  key_facts all = over_lanes({part.x, __uint_as_float(part.y)}, select_warps);
  if (team.size() == 1) return all;
  if (team.thread() == 0) memory.facts[turn] = all;
  team.sync_own();
  return over_lanes(*team.at_peer(&memory.facts[turn], team.lane() & (team.size() - 1)), team.size());
}

}  // namespace specattn::inline SPECATTN_CODE::detail
