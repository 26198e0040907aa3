// recompute() on the device: one launch, four lanes a key row, the queries in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../../recompute.hpp"
#include "../context.cuh"
#include "../device/launch.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int recompute_threads = 256;
inline constexpr int recompute_lanes = 4;   ///< that share a key row, piece by piece
inline constexpr int recompute_keys = 2;    ///< rows that a lane has at once
inline constexpr int recompute_pieces = 4;  ///< of each of them, loaded before the first is used
inline constexpr int recompute_tile = 32 / recompute_lanes * recompute_keys;  ///< positions a warp takes at once
inline constexpr std::int32_t recompute_most_head_dim = 1024;

template <storage T>
struct recompute_launch {
  recompute_args<T, cuda> args;
  float scale = 1.0f;
  std::int32_t group = 1;  ///< query heads of a kv head
};

/// Elements that one load brings.
template <storage T, int Elements>
struct alignas(sizeof(T) * Elements) key_piece {
  T elements[Elements];
};

/// One sequence and kv head, as a CTA sees it.
template <storage T>
class recompute_block {
 public:
  __device__ recompute_block(const recompute_launch<T>& launch, std::int32_t sequence, std::int32_t kv_head)
      : l_(launch), a_(launch.args), sequence_(sequence), kv_head_(kv_head) {
    cache_row_ = a_.cache_rows.empty() ? sequence : a_.cache_rows[sequence];
    first_slot_ = a_.slot_offsets[sequence];
    slots_ = a_.slot_offsets[sequence + 1] - first_slot_;
    kv_len_ = kept_ = a_.kv_lens[sequence];
    if (a_.kept.counts.empty()) return;
    const std::ptrdiff_t g = sequence * a_.kept_sequence_stride + kv_head;
    const std::int32_t count = a_.kept.counts[g];
    if (count == keep_all) return;
    const auto capacity = static_cast<std::int32_t>(a_.kept.capacity());
    kept_ = count < capacity ? count : capacity;
    if (kept_ > 0) list_ = &a_.kept.positions(g, 0);
  }

  /// Query rows to record: heads of the group within slots.
  __device__ std::int32_t rows() const {
    if (a_.recording.slots == record_slots::all) return slots_ * l_.group;
    return slots_ > 0 ? l_.group : 0;
  }
  /// Entries that a row has room for and that its slot attends to.
  __device__ std::int32_t limit(std::int32_t row) const {
    const auto room = static_cast<std::int32_t>(a_.recording.weights.extent(2));
    const std::int32_t attended = kept_ + slot_of(row) + 1;
    return attended < room ? attended : room;
  }
  __device__ const float* query(std::int32_t row) const { return &a_.q(first_slot_ + slot_of(row), head_of(row), 0); }
  __device__ float lse(std::int32_t row) const { return a_.lse(first_slot_ + slot_of(row), head_of(row)); }
  __device__ float* weights(std::int32_t row) const {
    const bool newest = a_.recording.slots == record_slots::newest;
    return &a_.recording.weights(newest ? sequence_ : first_slot_ + slot_of(row), head_of(row), 0);
  }
  __device__ const T* key(std::int32_t at) const {
    const std::int32_t position = at >= kept_        ? kv_len_ + at - kept_
                                  : list_ != nullptr ? list_[at * a_.kept.positions.stride(1)]
                                                     : at;
    return a_.kv.key(cache_row_, position, kv_head_);
  }

 private:
  __device__ std::int32_t slot_of(std::int32_t row) const {
    return a_.recording.slots == record_slots::all ? row / l_.group : slots_ - 1;
  }
  __device__ std::int32_t head_of(std::int32_t row) const { return kv_head_ * l_.group + row % l_.group; }

  const recompute_launch<T>& l_;
  const recompute_args<T, cuda>& a_;
  std::int32_t sequence_, kv_head_, cache_row_, first_slot_, slots_, kv_len_, kept_;
  const std::int32_t* list_ = nullptr;
};

/// Adds a lane's pieces of its key rows, times the queries, to its sums.
template <storage T, int Rows, int Elements>
__device__ __forceinline__ void add_products(float (&sums)[recompute_keys][Rows],
                                             const T* const (&keys)[recompute_keys], const float* queries,
                                             std::int32_t head_dim) {
  using piece = key_piece<T, Elements>;
  const auto lane = static_cast<std::int32_t>(threadIdx.x % recompute_lanes);
  constexpr std::int32_t step = recompute_lanes * Elements;
  constexpr int quad = Elements % 4 == 0 ? 4 : 1;  // of shared memory at once
  for (std::int32_t first = lane * Elements; first < head_dim; first += recompute_pieces * step) {
    piece pieces[recompute_pieces][recompute_keys];
#pragma unroll
    for (int i = 0; i < recompute_pieces; ++i)
#pragma unroll
      for (int k = 0; k < recompute_keys; ++k)
        if (first + i * step < head_dim) pieces[i][k] = *reinterpret_cast<const piece*>(keys[k] + first + i * step);
#pragma unroll
    for (int i = 0; i < recompute_pieces; ++i) {
      const std::int32_t d = first + i * step;
      if (d >= head_dim) break;
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
#pragma unroll
        for (int e = 0; e < Elements; e += quad) {
          const auto query = *reinterpret_cast<const key_piece<float, quad>*>(queries + r * head_dim + d + e);
#pragma unroll
          for (int k = 0; k < recompute_keys; ++k)
#pragma unroll
            for (int q = 0; q < quad; ++q)
              sums[k][r] = std::fma(to_float(pieces[i][k].elements[e + q]), query.elements[q], sums[k][r]);
        }
      }
    }
  }
}

/// A CTA takes a share of the positions of one sequence and kv head, for `Rows` query rows at a time.
template <storage T, int Rows, int Elements>
__global__ void __launch_bounds__(recompute_threads)
    recompute_kernel(const __grid_constant__ recompute_launch<T> launch) {
  extern __shared__ __align__(16) float queries[];  // [Rows, head_dim], times the scale
  const std::int32_t kv_heads = launch.args.kv.kv_heads;
  const std::int32_t head_dim = launch.args.kv.head_dim;
  const std::int32_t kv_head = static_cast<std::int32_t>(blockIdx.x) % kv_heads;
  const recompute_block<T> block(launch, static_cast<std::int32_t>(blockIdx.x) / kv_heads, kv_head);
  const float scale = launch.scale * launch.args.kv.key_scale(kv_head);
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const std::int32_t lane = thread % recompute_lanes;
  const std::int32_t inside = thread % 32 / recompute_lanes;
  const std::int32_t warps = static_cast<std::int32_t>(gridDim.y) * (recompute_threads / 32);
  const std::int32_t warp = static_cast<std::int32_t>(blockIdx.y) * (recompute_threads / 32) + thread / 32;
  const std::ptrdiff_t stride = launch.args.recording.weights.stride(2);
  for (std::int32_t first_row = 0; first_row < block.rows(); first_row += Rows) {
    const std::int32_t left = block.rows() - first_row;
    const std::int32_t rows = left < Rows ? left : Rows;
    __syncthreads();
    for (std::int32_t i = thread; i < Rows * head_dim; i += recompute_threads) {
      const std::int32_t row = i / head_dim;
      queries[i] = row < rows ? block.query(first_row + row)[i % head_dim * launch.args.q.stride(2)] * scale : 0.0f;
    }
    __syncthreads();
    const std::int32_t end = block.limit(first_row + rows - 1);
    for (std::int32_t begin = warp * recompute_tile; begin < end; begin += warps * recompute_tile) {
      const T* keys[recompute_keys];
#pragma unroll
      for (int k = 0; k < recompute_keys; ++k) {
        const std::int32_t at = begin + k * (recompute_tile / recompute_keys) + inside;
        keys[k] = block.key(at < end ? at : end - 1);
      }
      float sums[recompute_keys][Rows] = {};
      add_products<T, Rows, Elements>(sums, keys, queries, head_dim);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        float* weights = nullptr;
        std::int32_t limit = 0;
        float lse = 0.0f;
        if (r < rows && lane == r % recompute_lanes) {
          weights = block.weights(first_row + r);
          limit = block.limit(first_row + r);
          lse = block.lse(first_row + r);
        }
#pragma unroll
        for (int k = 0; k < recompute_keys; ++k) {
          float score = sums[k][r];
          for (int mask = recompute_lanes / 2; mask > 0; mask /= 2) score += __shfl_xor_sync(~0u, score, mask);
          const std::int32_t at = begin + k * (recompute_tile / recompute_keys) + inside;
          if (at < limit) weights[at * stride] = std::exp(score - lse);
        }
      }
    }
  }
}

template <>
struct recompute_impl<cuda> {
  template <storage T>
  static void run(context<cuda>& ctx, const recompute_args<T, cuda>& args) {
    if (args.q.extent(0) == 0 || args.kv_lens.extent(0) == 0 || args.q.extent(1) == 0) return;
    expects(args.kv.head_dim <= recompute_most_head_dim, "recompute: head_dim ", args.kv.head_dim, ", at most ",
            recompute_most_head_dim, " on cuda");
    constexpr int whole = 16 / static_cast<int>(sizeof(T));
    const auto strides = args.kv.head_dim | args.kv.page_stride | args.kv.position_stride | args.kv.head_stride;
    if (reinterpret_cast<std::uintptr_t>(args.kv.keys) % 16 == 0 && strides % whole == 0) {
      run_with<whole>(ctx, args);
    } else {
      run_with<1>(ctx, args);
    }
  }

 private:
  template <int Elements, storage T>
  static void run_with(const context<cuda>& ctx, const recompute_args<T, cuda>& args) {
    const std::ptrdiff_t group = args.q.extent(1) / args.kv.kv_heads;
    const bool few = args.recording.slots == record_slots::newest && group <= 4;
    if (few && group == 1) return start<1, Elements>(ctx, args);
    if (few) return start<4, Elements>(ctx, args);
    start<8, Elements>(ctx, args);
  }

  /// As many CTAs as fill the device a few times, whatever the lengths turn out to be.
  template <int Rows, int Elements, storage T>
  static void start(const context<cuda>& ctx, const recompute_args<T, cuda>& args) {
    recompute_launch<T> launch{args, args.scale, static_cast<std::int32_t>(args.q.extent(1)) / args.kv.kv_heads};
    if (launch.scale == 0.0f) launch.scale = 1.0f / std::sqrt(static_cast<float>(args.kv.head_dim));
    const std::ptrdiff_t groups = args.kv_lens.extent(0) * args.kv.kv_heads;
    const std::ptrdiff_t tiles = args.recording.weights.extent(2) / (recompute_tile * recompute_threads / 32) + 1;
    const std::ptrdiff_t wanted = 8 * std::ptrdiff_t{ctx.multiprocessors()} / groups + 1;
    const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>((std::min)(tiles, wanted)));
    start_kernel(ctx, recompute_kernel<T, Rows, Elements>, grid, recompute_threads, launch, "recompute",
                 Rows * sizeof(float) * static_cast<std::size_t>(args.kv.head_dim));
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
