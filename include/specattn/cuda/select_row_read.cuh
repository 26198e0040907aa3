// A lone row on its way into shared memory: its keys, a sample of them, and what must be known before they are summed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../scalar.hpp"
#include "select_row_threshold.cuh"
#include "select_search.cuh"
#include "select_team.cuh"

namespace specattn::inline v0_1::detail {

struct key_facts {
  std::uint32_t max_key;
  float sum;
};

/// Where a position of a CTA lies, of whose words a thread has one or two: fours are permuted so that threads that read
/// their words meet no bank conflict.
__device__ inline std::int32_t place_of(std::int32_t i, int each_words) {
  return i ^ ((i >> (4 + each_words) & 7) * 4);
}

/// Reads the CTA's part of the row and counts the sample. Weights that are not valid have larger keys than any that
/// are.
template <storage T>
__device__ __forceinline__ key_facts read_row(const T* row, std::ptrdiff_t stride, item_range range, int each_words,
                                              std::uint32_t* keys, std::uint32_t* sample_counts) {
  struct alignas(4 * sizeof(T)) four_weights {
    T x[4];
  };
  key_facts facts{0, 0.0f};
  const std::int32_t count = range.last - range.first;
  const bool vectors = stride == 1 && reinterpret_cast<std::uintptr_t>(row) % sizeof(four_weights) == 0;
  const auto take = [&](std::int32_t four, const T(&x)[4], int sample) {
    std::uint32_t key[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float weight = to_float(x[j]);
      key[j] = __float_as_uint(weight);
      facts.max_key = facts.max_key > key[j] ? facts.max_key : key[j];
      facts.sum += weight;
      if (j == sample) atomicAdd(&sample_counts[key[j] >> sample_shift & (sample_bins - 1)], 1u);
    }
    *reinterpret_cast<uint4*>(keys + place_of(four * 4, each_words)) = {key[0], key[1], key[2], key[3]};
  };
  constexpr int ahead = 4;  // loads in flight
  std::int32_t four = select_team::thread();
  if (vectors) {
    const auto* fours = reinterpret_cast<const four_weights*>(row);
#pragma unroll 1
    for (; (four + (ahead - 1) * select_threads) * 4 + 3 < count; four += ahead * select_threads) {
      four_weights part[ahead];
#pragma unroll
      for (int i = 0; i < ahead; ++i) part[i] = fours[four + i * select_threads];
#pragma unroll
      for (int i = 0; i < ahead; ++i) take(four + i * select_threads, part[i].x, i % 2 == 0 ? i : -1);
    }
  }
#pragma unroll 1
  for (; four < range.words * 8; four += select_threads) {
    T x[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (four * 4 + j < count) x[j] = row[(four * 4 + j) * stride];
    }
    take(four, x, four / select_threads % 2 == 0 && four * 4 < count ? 0 : -1);
  }
  return facts;
}

/// The largest key and the sum over the cluster, the same to the bit in every CTA.
__device__ __forceinline__ key_facts exchange_facts(const select_team& team, select_row_memory& memory, int turn,
                                                    key_facts mine) {
  const std::uint32_t most = __reduce_max_sync(~0u, mine.max_key);
  for (int distance = 16; distance > 0; distance /= 2) mine.sum += __shfl_xor_sync(~0u, mine.sum, distance);
  if (team.lane() == 0) memory.warps[team.warp()] = {most, __float_as_uint(mine.sum)};
  __syncthreads();
  const auto join = [](key_facts all, uint2 part) {
    return key_facts{all.max_key > part.x ? all.max_key : part.x, all.sum + __uint_as_float(part.y)};
  };
  if (team.thread() < team.size()) {
    key_facts block{0, 0.0f};
#pragma unroll
    for (int warp = 0; warp < select_warps; ++warp) block = join(block, memory.warps[warp]);
    team.at_peer(memory.members[turn], team.thread())[team.rank()] = {block.max_key, __float_as_uint(block.sum)};
  }
  team.sync();
  key_facts all{0, 0.0f};
  team.each_peer([&](int peer) { all = join(all, memory.members[turn][peer]); });
  return all;
}

}  // namespace specattn::inline v0_1::detail
