// The draft's rows, scaled to unit mass and averaged over the steps, as bf16 blocks that the product takes as they are.
#pragma once

#include <cuda_fp16.h>

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "../importance.hpp"
#include "importance_product.cuh"

namespace specattn::inline v0_1::detail {

inline constexpr int importance_threads = 256;

/// What one launch works on: positions [begin, begin + window) of one row of every group.
template <storage T>
struct importance_launch {
  importance_args<cuda, T> args;
  std::byte* signals;               ///< [tiles of the window, chunks] blocks of signal_block_bytes
  const std::byte* coefficients;    ///< [slabs, chunks] blocks of coefficient_block_bytes
  const float* uniform;             ///< [groups, uniforms] coefficients of windows and sinks
  const std::int32_t* uniform_len;  ///< [uniforms] positions asked for; the sinks, when there are any, last
  const float* history;             ///< [groups] coefficients; nullptr: there is none
  std::int32_t uniforms, windows;
  std::int32_t groups, kv_heads, chunks, slabs;
  std::int32_t begin, window, row;
  bool wide_reads;   ///< rows of draft weights are 16-byte aligned
  bool wide_writes;  ///< rows of out are 8-byte aligned

  __device__ std::int32_t kv_len() const {
    if (args.length.empty()) return args.kv_len;
    const std::int32_t now = args.length[0];
    return now < 0 ? 0 : now < args.kv_len ? now : args.kv_len;
  }
  /// Tiles of the window that the prefix reaches.
  __device__ std::int32_t tiles() const {
    const std::int32_t left = kv_len() - begin;
    return ((left < window ? left : window) + importance_tile - 1) / importance_tile;
  }
};

/// Eight neighbouring weights of a row.
template <storage T>
struct weight_octet {
  static constexpr int words = sizeof(T) * 8 / 4;
  std::uint32_t raw[words] = {};

  /// Reads the first `count` of them, the others being zero.
  __device__ __forceinline__ void load(const T* from, std::int32_t count, bool wide) {
    if (wide && count >= 8) {
#pragma unroll
      for (int w = 0; w < words; w += 4) {
        const uint4 four = __ldcs(reinterpret_cast<const uint4*>(from) + w / 4);
        raw[w] = four.x, raw[w + 1] = four.y, raw[w + 2] = four.z, raw[w + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i >= count) continue;
        if constexpr (std::same_as<T, float>) {
          raw[i] = __float_as_uint(from[i]);
        } else {
          raw[i / 2] |= static_cast<std::uint32_t>(from[i].bits) << i % 2 * 16;
        }
      }
    }
  }
  __device__ __forceinline__ float at(int i) const {
    if constexpr (std::same_as<T, float>) {
      return __uint_as_float(raw[i]);
    } else if constexpr (std::same_as<T, bf16>) {
      return __uint_as_float(i % 2 == 0 ? raw[i / 2] << 16 : raw[i / 2] & 0xffff0000u);
    } else {
      return __half2float(__ushort_as_half(static_cast<std::uint16_t>(raw[i / 2] >> i % 2 * 16)));
    }
  }
};

/// A CTA makes 16 draft heads × a tile of positions: a thread eight positions of one head, from every step.
template <storage T>
__global__ void __launch_bounds__(importance_threads, sizeof(T) == 2 ? 4 : 3)
    combine_steps_kernel(const __grid_constant__ importance_launch<T> launch) {
  constexpr int ahead = 4;  // steps whose loads are in flight together
  const auto& args = launch.args;
  const int thread = static_cast<int>(threadIdx.x);
  const auto tile = static_cast<std::int32_t>(blockIdx.x);
  if (tile >= launch.tiles()) return;
  const std::int32_t signal = static_cast<std::int32_t>(blockIdx.y) * 16 + thread / 16;
  const auto q_heads = static_cast<std::int32_t>(args.draft_weights.extent(2));
  const std::int32_t layer = signal / q_heads, head = signal % q_heads;
  const std::int32_t position = launch.begin + tile * importance_tile + thread % 16 * 8;
  const std::int32_t left = layer < args.draft_weights.extent(1) ? launch.kv_len() - position : 0;
  const std::int32_t first = args.separate_steps ? launch.row : 0;
  const std::int32_t steps = args.separate_steps ? 1 : static_cast<std::int32_t>(args.draft_weights.extent(0));
  float sums[8] = {};
  for (std::int32_t step = 0; left > 0 && step < steps; step += ahead) {
    weight_octet<T> weights[ahead];
    float factors[ahead] = {};
#pragma unroll
    for (int s = 0; s < ahead; ++s) {
      if (step + s >= steps) continue;
      weights[s].load(&args.draft_weights(first + step + s, layer, head, position), left, launch.wide_reads);
      const float mass = args.masses(first + step + s, layer, head);
      factors[s] = mass > 0.0f ? 1.0f / (mass * static_cast<float>(steps)) : 0.0f;
      if (!args.split_scales.empty())
        factors[s] *= args.split_scales(first + step + s, layer, head, position / args.split_len);
    }
#pragma unroll
    for (int s = 0; s < ahead; ++s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] = fmaf(factors[s], weights[s].at(i), sums[i]);
    }
  }
  const std::ptrdiff_t block = std::ptrdiff_t{tile} * launch.chunks + signal / importance_chunk;
  std::byte* to =
      launch.signals + block * signal_block_bytes + packed_signals(signal % importance_chunk, thread % 16);
  *reinterpret_cast<uint4*>(to) = uint4{rounded_pair<bf16>(sums[0], sums[1]), rounded_pair<bf16>(sums[2], sums[3]),
                                        rounded_pair<bf16>(sums[4], sums[5]), rounded_pair<bf16>(sums[6], sums[7])};
}

}  // namespace specattn::inline v0_1::detail
