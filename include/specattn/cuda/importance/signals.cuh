// The draft's rows, scaled to unit mass and averaged over the steps, as bf16 blocks that the product takes as they are.
#pragma once

#include <cuda_fp16.h>

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "../../importance.hpp"
#include "../device/mma.cuh"
#include "product.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// A tile of a sequence's positions, of which `left` belong to its prefix: 0 or fewer where there is nothing to do.
struct importance_place {
  std::int32_t sequence, begin, left;
};

/// What one launch works on: tiles [begin, end) of the batch, one row of every group. Sequence s has the tiles from
/// s * tiles on; tiles is a multiple of every cluster's size.
template <storage T, storage U = float>
struct importance_launch {
  importance_args<cuda, T, U> args;
  std::byte* signals;               ///< [end - begin, chunks] blocks of signal_block_bytes
  const std::byte* coefficients;    ///< [slabs, chunks] blocks of coefficient_block_bytes
  const float* uniform;             ///< [groups, uniforms] coefficients of windows and sinks
  const std::int32_t* uniform_len;  ///< [uniforms] positions asked for; the sinks, when there are any, last
  const float* history;             ///< [groups] coefficients; nullptr: there is none
  std::int32_t uniforms, windows;
  std::int32_t groups, kv_heads, chunks, slabs;
  std::int32_t tiles, begin, end, row;
  bool wide_reads;   ///< rows of draft weights are 16-byte aligned
  bool wide_writes;  ///< every fourth position of out is aligned

  __device__ std::int32_t kv_len(std::int32_t sequence) const {
    if (args.length.empty()) return args.kv_len;
    const std::int32_t now = args.length[sequence];
    return now < 0 ? 0 : now < args.kv_len ? now : args.kv_len;
  }
  __device__ importance_place place(std::int32_t tile) const {
    const std::int32_t sequence = tile / tiles, first = tile % tiles * importance_tile;
    return {sequence, first, kv_len(sequence) - first};
  }
  /// The step that a row begins with: that of the row, or the last one that the sequence has taken.
  __device__ std::int32_t first_step(std::int32_t sequence) const {
    if (!args.separate_steps) return 0;
    const std::int32_t last = args.steps_of(sequence) - 1;
    return row < last ? row : last;
  }
  __device__ std::int32_t steps(std::int32_t sequence) const {
    return args.separate_steps ? 1 : args.steps_of(sequence);
  }
  __device__ std::int32_t all_steps() const {
    return args.separate_steps ? 1 : static_cast<std::int32_t>(args.draft_weights.extent(0));
  }
};

/// What a CTA works on in turn: a tile of positions × a slab of groups. CTAs of a cluster have the same slab and
/// neighbouring tiles of one sequence; neighbouring clusters have the same tiles.
template <class Launch>
class item_walk {
 public:
  __device__ explicit item_walk(const Launch& launch)
      : launch_(launch), item_(static_cast<std::int32_t>(blockIdx.x) / importance_cluster) {
    skip();
  }
  __device__ bool more() const { return item_ < (launch_.end - launch_.begin) / importance_cluster * launch_.slabs; }
  __device__ void next() {
    item_ += static_cast<std::int32_t>(gridDim.x) / importance_cluster;
    skip();
  }
  __device__ std::int32_t slab() const { return item_ % launch_.slabs; }
  /// Counted from the launch's first.
  __device__ std::int32_t tile() const {
    return first_tile() + static_cast<std::int32_t>(blockIdx.x) % importance_cluster;
  }
  __device__ importance_place place() const { return launch_.place(launch_.begin + tile()); }

 private:
  __device__ std::int32_t first_tile() const { return item_ / launch_.slabs * importance_cluster; }
  /// To the next item that has something to do.
  __device__ void skip() {
    while (more() && launch_.place(launch_.begin + first_tile()).left <= 0)
      item_ += static_cast<std::int32_t>(gridDim.x) / importance_cluster;
  }
  const Launch& launch_;
  std::int32_t item_;
};

/// Neighbouring weights of a row, 16 bytes of them.
template <storage T>
struct weight_piece {
  static constexpr int size = 16 / sizeof(T);
  static constexpr int across = importance_tile / size;  ///< pieces of a tile's row
  std::uint32_t raw[4] = {};

  /// Reads the first `count` of them, the others being zero.
  __device__ __forceinline__ void load(const T* from, std::int32_t count, bool wide) {
    if (wide && count >= size) {
      const uint4 four = __ldcs(reinterpret_cast<const uint4*>(from));
      raw[0] = four.x, raw[1] = four.y, raw[2] = four.z, raw[3] = four.w;
      return;
    }
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (i >= count) continue;
      if constexpr (std::same_as<T, float>) {
        raw[i] = __float_as_uint(from[i]);
      } else {
        raw[i / 2] |= static_cast<std::uint32_t>(from[i].bits) << i % 2 * 16;
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

/// The mean over the steps of a piece of a draft head's row.
template <storage T>
struct mean_piece {
  float sums[weight_piece<T>::size] = {};

  __device__ __forceinline__ void add(const weight_piece<T>& weights, float factor) {
#pragma unroll
    for (int i = 0; i < weights.size; ++i) sums[i] = fmaf(factor, weights.at(i), sums[i]);
  }
  /// As bf16 to the eight of signals that `signal` is one of.
  __device__ __forceinline__ void store(std::byte* eight, int signal, int piece) const {
    if constexpr (std::same_as<T, float>) {
      *reinterpret_cast<uint2*>(eight + packed_signals(signal, piece / 2) + piece % 2 * 8) = {
          rounded_pair<bf16>(sums[0], sums[1]), rounded_pair<bf16>(sums[2], sums[3])};
    } else {
      *reinterpret_cast<uint4*>(eight + packed_signals(signal, piece)) = {
          rounded_pair<bf16>(sums[0], sums[1]), rounded_pair<bf16>(sums[2], sums[3]),
          rounded_pair<bf16>(sums[4], sums[5]), rounded_pair<bf16>(sums[6], sums[7])};
    }
  }
};

/// What a stored weight of a row is multiplied with.
__device__ __forceinline__ float mass_factor(float mass, std::int32_t steps) {
  return mass > 0.0f ? __fdividef(1.0f, mass * static_cast<float>(steps)) : 0.0f;
}

/// A CTA makes a few draft heads × a tile of positions: a thread a piece of one head, from every step. blockIdx.x: the
/// tile; y: the heads.
template <storage T, storage U>
__global__ void __launch_bounds__(importance_threads, 4)
    combine_steps_kernel(const __grid_constant__ importance_launch<T, U> launch) {
  using piece = weight_piece<T>;
  constexpr int ahead = 4;  // steps whose loads are in flight together
  const auto& args = launch.args;
  const int thread = static_cast<int>(threadIdx.x), column = thread % piece::across;
  const auto tile = static_cast<std::int32_t>(blockIdx.x);
  const importance_place place = launch.place(launch.begin + tile);
  if (place.left <= 0) return;
  const std::int32_t signal =
      static_cast<std::int32_t>(blockIdx.y) * (importance_threads / piece::across) + thread / piece::across;
  const auto q_heads = static_cast<std::int32_t>(args.draft_weights.extent(3));
  const std::int32_t layer = signal / 8 / head_eights(q_heads), s = place.sequence;
  const std::int32_t head = signal - layer * head_eights(q_heads) * 8;
  const std::int32_t position = place.begin + column * piece::size;
  const bool exists = layer < args.draft_weights.extent(1) && head < q_heads;
  const std::int32_t left = exists ? place.left - column * piece::size : 0;
  const std::int32_t first = launch.first_step(s), steps = launch.steps(s);
  mean_piece<T> mean;
  for (std::int32_t step = 0; left > 0 && step < steps; step += ahead) {
    piece weights[ahead];
    float factors[ahead] = {};
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (step + i >= steps) continue;
      weights[i].load(&args.draft_weights(first + step + i, layer, s, head, position), left, launch.wide_reads);
      factors[i] = mass_factor(args.masses(first + step + i, layer, s, head), steps);
      if (!args.split_scales.empty())
        factors[i] *= args.split_scales(first + step + i, layer, s, head, position / args.split_len);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) mean.add(weights[i], factors[i]);
  }
  const std::ptrdiff_t block = std::ptrdiff_t{tile} * launch.chunks + signal / importance_chunk;
  mean.store(launch.signals + block * signal_block_bytes + signal % importance_chunk / 8 * packed_eight_bytes,
             signal % 8, column);
}

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
