// A lone row on its way into shared memory: its keys, and what must be known before they are summed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../scalar.hpp"
#include "select_row_memory.cuh"
#include "select_search.cuh"
#include "select_team.cuh"

namespace specattn::inline v0_1::detail {

/// Where a position of a CTA lies, of whose words a thread has one or two: fours are permuted so that threads that read
/// their words meet no bank conflict. Within 512 positions, so that i + 512 n lies 512 n behind i.
__device__ inline std::int32_t place_of(std::int32_t i, int each_words) {
  return i ^ ((i >> (4 + each_words) & 7) * 4);
}

__device__ __forceinline__ std::uint32_t larger(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  return __vimax3_u32(a, b, c);
}

/// Copies four weights to shared memory without a register in between.
__device__ __forceinline__ void copy_four(std::uint32_t* to, const float* from) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                   static_cast<std::uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  for (int i = 0; i < 4; ++i) to[i] = __float_as_uint(from[i]);
#endif
}
/// This thread's copies have arrived.
__device__ __forceinline__ void await_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

/// As read_row(), of aligned floats: all of a thread's are on their way at once.
__device__ __forceinline__ key_facts copy_row(const float* row, item_range range, int each_words,
                                              std::uint32_t* keys) {
  constexpr int step = select_threads * 4;
  const int thread = select_team::thread();
  const std::int32_t count = range.last - range.first;
  const std::int32_t whole = count / 4 * 4 - thread * 4;
  const std::int32_t end = range.words * 32 - thread * 4;
  std::uint32_t* own = keys + place_of(thread * 4, each_words);
  row += thread * 4;
  const float* from = row;
  std::uint32_t* to = own;
#pragma unroll 8
  for (std::int32_t i = 0; i < whole; i += step, from += step, to += step) copy_four(to, from);
  // The last word has up to eight fours that are not whole; a thread has one of them at most.
  const std::int32_t ragged = count / 4 + ((thread - count / 4) & (select_threads - 1));
  if (ragged < range.words * 8) {
    const std::int32_t i = (ragged - thread) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) own[i + j] = ragged * 4 + j < count ? __float_as_uint(row[i + j]) : 0;
  }
  await_copies();
  key_facts facts{0, 0.0f};
#pragma unroll 4
  for (std::int32_t i = 0; i < end; i += step) {
    const uint4 four = *reinterpret_cast<const uint4*>(own + i);
    facts.max_key = larger(larger(facts.max_key, four.x, four.y), four.z, four.w);
    facts.sum += (__uint_as_float(four.x) + __uint_as_float(four.y)) + (__uint_as_float(four.z) + __uint_as_float(four.w));
  }
  return facts;
}

/// Reads the CTA's part of the row. Weights that are not valid have larger keys than any that are.
template <storage T>
__device__ __forceinline__ key_facts read_row(const T* row, std::ptrdiff_t stride, item_range range, int each_words,
                                              std::uint32_t* keys) {
  struct alignas(4 * sizeof(T)) four_weights {
    T x[4];
  };
  key_facts facts{0, 0.0f};
  const std::int32_t count = range.last - range.first;
  const std::int32_t words_end = range.words * 8;
  const bool vectors = stride == 1 && reinterpret_cast<std::uintptr_t>(row) % sizeof(four_weights) == 0;
  if constexpr (std::is_same_v<T, float>) {
    if (vectors) return copy_row(row, range, each_words, keys);
  }
  const auto take = [&](std::int32_t place, const T(&x)[4]) {
    float weight[4];
    std::uint32_t key[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weight[j] = to_float(x[j]);
      key[j] = __float_as_uint(weight[j]);
    }
    facts.max_key = larger(larger(facts.max_key, key[0], key[1]), key[2], key[3]);
    facts.sum += (weight[0] + weight[1]) + (weight[2] + weight[3]);
    *reinterpret_cast<uint4*>(keys + place) = {key[0], key[1], key[2], key[3]};
  };
  constexpr int ahead = 8;  // loads in flight
  constexpr int step = select_threads;
  const int thread = select_team::thread();
  static_assert(step * 4 % 512 == 0);
  const std::int32_t own = place_of(thread * 4, each_words);
  if (!vectors) {
#pragma unroll 1
    for (std::int32_t four = 0; four + thread < words_end; four += step) {
      T x[4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const std::int32_t i = (four + thread) * 4 + j;
        if (i < count) x[j] = row[i * stride];
      }
      take(own + four * 4, x);
    }
    return facts;
  }
  const auto* fours = reinterpret_cast<const four_weights*>(row) + thread;
  four_weights part[ahead];
  std::int32_t four = 0;
#pragma unroll 1
  for (; (four + ahead * step) * 4 <= count; four += ahead * step) {
#pragma unroll
    for (int i = 0; i < ahead; ++i) part[i] = fours[four + i * step];
#pragma unroll
    for (int i = 0; i < ahead; ++i) take(own + (four + i * step) * 4, part[i].x);
  }
  if (four >= words_end) return facts;
#pragma unroll
  for (int i = 0; i < ahead; ++i) {
    part[i] = {};
    if (four + i * step + thread < count / 4) part[i] = fours[four + i * step];
  }
#pragma unroll
  for (int i = 0; i < ahead; ++i) {
    if (four + i * step + thread < words_end) take(own + (four + i * step) * 4, part[i].x);
  }
  if (count % 4 != 0 && (count / 4) % step == thread) {
    const std::int32_t whole = count / 4 * 4;
    T x[4] = {};
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      if (whole + j < count) x[j] = row[whole + j];
    }
    take(own + whole - thread * 4, x);
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

}  // namespace specattn::inline v0_1::detail
