// Where the product's sums go: windows and sinks are added in registers, then rows are written as float or fp16; history
// is added to what was written.
#pragma once

#include <cuda_fp16.h>

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "../device/mma.cuh"
#include "product.cuh"
#include "signals.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// Adds windows and sinks to a thread's sums.
template <storage T, storage U>
__device__ __forceinline__ void add_uniform(const importance_launch<T, U>& launch, const importance_place& place,
                                            std::int32_t first_group, importance_sums& sums) {
  const std::int32_t begin = place.begin, kv_len = begin + place.left;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (std::int32_t u = 0; u < launch.uniforms; ++u) {
    const uniform_signal signal{launch.uniform_len[u], u < launch.windows};
    const std::int32_t count = signal.count(kv_len), first = signal.first(kv_len);
    if (first >= begin + importance_tile || first + count <= begin) continue;
    const std::int32_t offset = begin + lane % 4 * 2 - first;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::int32_t group = first_group + importance_sums::row(warp, lane, i, h);
        if (group >= launch.groups) continue;
        const float each = launch.uniform[std::ptrdiff_t{group} * launch.uniforms + u] / static_cast<float>(count);
#pragma unroll
        for (int j = 0; j < importance_tile / 8; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (static_cast<std::uint32_t>(offset + j * 8 + c) < static_cast<std::uint32_t>(count))
              sums.at[i][j * 4 + h * 2 + c] += each;
          }
        }
      }
    }
  }
}

/// As it is stored.
template <storage U>
__device__ __forceinline__ U stored_importance(float x) {
  if constexpr (std::same_as<U, float>) {
    return x;
  } else {
    return {__half_as_ushort(__float2half_rn(fminf(x * (1.0f / importance_unit<fp16>), 65504.0f)))};
  }
}

/// Four neighbouring positions, of which the lane has either two; its neighbour has the others.
template <storage U>
__device__ __forceinline__ void write_four(U* to, float2 own, float2 others, bool own_first) {
  const float2 first = own_first ? own : others, second = own_first ? others : own;
  if constexpr (std::same_as<U, float>) {
    *reinterpret_cast<float4*>(to) = float4{first.x, first.y, second.x, second.y};
  } else {
    constexpr float unit = 1.0f / importance_unit<fp16>, most = 65504.0f;
    *reinterpret_cast<uint2*>(to) =
        uint2{rounded_pair<fp16>(fminf(first.x * unit, most), fminf(first.y * unit, most)),
              rounded_pair<fp16>(fminf(second.x * unit, most), fminf(second.y * unit, most))};
  }
}

/// Of a whole tile, neighbouring lanes exchange halves, so that a warp's write fills sectors of memory.
template <storage T, storage U>
__device__ __forceinline__ void write_sums(const importance_launch<T, U>& launch, const importance_place& place,
                                           std::int32_t first_group, const importance_sums& sums) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const bool whole = launch.wide_writes && place.left >= importance_tile, even = lane % 2 == 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t group = first_group + importance_sums::row(warp, lane, i, h);
      const bool exists = group < launch.groups;
      U* out = exists ? &launch.args.out(group / launch.kv_heads, place.sequence, group % launch.kv_heads, launch.row,
                                         place.begin)
                      : nullptr;
      const auto pair = [&](int j) { return float2{sums.at[i][j * 4 + h * 2], sums.at[i][j * 4 + h * 2 + 1]}; };
      if (whole) {
        out += even ? lane % 4 * 2 : 8 + (lane % 4 - 1) * 2;
#pragma unroll
        for (int j = 0; j < importance_tile / 8; j += 2) {
          const float2 own = even ? pair(j) : pair(j + 1), given = even ? pair(j + 1) : pair(j);
          const float2 others{__shfl_xor_sync(~0u, given.x, 1), __shfl_xor_sync(~0u, given.y, 1)};
          if (exists) write_four(out + j * 8, own, others, even);
        }
      } else if (exists) {
#pragma unroll
        for (int j = 0; j < importance_tile / 8; ++j) {
          const int at = j * 8 + lane % 4 * 2;
          if (at < place.left) out[at] = stored_importance<U>(pair(j).x);
          if (at + 1 < place.left) out[at + 1] = stored_importance<U>(pair(j).y);
        }
      }
    }
  }
}

template <storage T, storage U>
__device__ __forceinline__ void finish(const importance_launch<T, U>& launch, const importance_place& place,
                                       std::int32_t slab, importance_sums& sums) {
  add_uniform(launch, place, slab * importance_slab, sums);
  write_sums(launch, place, slab * importance_slab, sums);
}

/// Adds the target's own weights of the round before to rows already written. blockIdx.x: a group of a sequence,
/// sequences slowest; y: its share.
template <storage T, storage U>
__global__ void __launch_bounds__(importance_threads)
    add_history_kernel(const __grid_constant__ importance_launch<T, U> launch) {
  constexpr int ahead = 4;  // entries of a thread in flight
  const auto s = static_cast<std::int32_t>(blockIdx.x) / launch.groups;
  const std::int32_t group = static_cast<std::int32_t>(blockIdx.x) - s * launch.groups;
  const float coefficient = launch.history[group];
  if (coefficient == 0.0f) return;
  const auto& history = launch.args.history;
  const std::ptrdiff_t row = history.row(s);
  const std::int32_t kv_len = launch.kv_len(s);
  const std::int32_t count = history.counts(row, group);
  const std::int32_t entries = count == keep_all ? kv_len : count;
  U* out = &launch.args.out(group / launch.kv_heads, s, group % launch.kv_heads, launch.row, 0);
  const auto apart = static_cast<std::int32_t>(gridDim.y * blockDim.x);
  for (auto first = static_cast<std::int32_t>(blockIdx.y * blockDim.x + threadIdx.x); first < entries;
       first += apart * ahead) {
    std::int32_t positions[ahead];
    float values[ahead] = {};
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const std::int32_t at = first + i * apart;
      positions[i] = kv_len;
      if (at >= entries) continue;
      positions[i] = count == keep_all ? at : history.positions(row, group, at);
      values[i] = history.weights(row, group, at);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (positions[i] < kv_len)
        values[i] = fmaf(coefficient, values[i], importance_unit<U> * to_float(out[positions[i]]));
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (positions[i] < kv_len) out[positions[i]] = stored_importance<U>(values[i]);
    }
  }
}

}  // namespace specattn::inline SPECATTN_CODE::detail
