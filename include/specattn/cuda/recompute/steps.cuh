// recompute_steps() on the device: one launch over chunks of positions of all layers, sequences and kv heads, each key read
// once for every step's queries, and a small one that adds up what chunks left of the masses, always in the same order.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../../recompute.hpp"
#include "../context.cuh"
#include "../device/launch.cuh"
#include "../device/mma.cuh"
#include "../device/warp.cuh"
#include "steps_tile.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int query_threads = 128;

/// A warp adds up a row's parts.
template <storage T>
__global__ void __launch_bounds__(query_threads)
    record_masses_kernel(const __grid_constant__ recompute_steps_launch<T> launch) {
  const std::ptrdiff_t row = std::ptrdiff_t{blockIdx.x} * (query_threads / 32) + threadIdx.x / 32;
  const auto& masses = launch.args.masses;
  const std::ptrdiff_t heads = masses.extent(3), sequences = masses.extent(2), layers = masses.extent(1);
  if (row >= masses.extent(0) * layers * sequences * heads) return;
  const std::ptrdiff_t s = row / heads % sequences;
  const std::int32_t chunks = (launch.length(static_cast<std::int32_t>(s)) + record_chunk - 1) / record_chunk;
  float sum = 0.0f;
  for (std::int32_t c = static_cast<std::int32_t>(threadIdx.x) % 32; c < chunks; c += 32)
    sum += launch.parts[row * launch.chunks + c];
  sum = sum_over_warp(sum);
  if (threadIdx.x % 32 == 0)
    masses(row / (layers * sequences * heads), row / (sequences * heads) % layers, s, row % heads) = sum;
}

template <>
struct recompute_steps_impl<cuda> {
  static std::size_t workspace_bytes(const context<cuda>&, std::ptrdiff_t rows, std::ptrdiff_t kv_len) {
    return static_cast<std::size_t>(rows * blocks_of(kv_len, record_chunk)) * sizeof(float);
  }

  template <storage T>
  static void run(context<cuda>& ctx, const recompute_steps_args<T, cuda>& args) {
    if (args.q.extent(0) * args.q.extent(1) * args.kv_lens.extent(0) * args.q.extent(3) == 0) return;
    recompute_steps_launch<T> launch{args};
    if (launch.args.scale == 0.0f) launch.args.scale = 1.0f / std::sqrt(static_cast<float>(args.kv.head_dim));
    const std::ptrdiff_t rows = args.weights.extent(0) * args.q.extent(1) * args.kv_lens.extent(0) * args.q.extent(3);
    launch.chunks = static_cast<std::int32_t>(blocks_of(args.weights.extent(4), record_chunk));
    launch.parts = reinterpret_cast<float*>(
        ctx.workspace(workspace_bytes(ctx, rows, args.weights.extent(4)), "recompute_steps"));
    if (!run_on_tensor_cores(ctx, launch)) {
      start_kernel(ctx, record_plain_kernel<T>, grid_of(launch), record_plain_threads, launch, "recompute_steps");
    }
    start_kernel(ctx, record_masses_kernel<T>, dim3(blocks_of(rows, query_threads / 32)), query_threads, launch,
                 "recompute_steps");
  }

 private:
  /// blockIdx.x: a kv head of a sequence of a layer; y: a chunk.
  template <storage T>
  static dim3 grid_of(const recompute_steps_launch<T>& launch) {
    return dim3(
        static_cast<unsigned>(launch.args.q.extent(1) * launch.args.kv_lens.extent(0) * launch.args.kv.kv_heads),
        static_cast<unsigned>(launch.chunks));
  }

  template <storage T>
  static bool run_on_tensor_cores(const context<cuda>& ctx, recompute_steps_launch<T>& launch) {
    if constexpr (tensor_storage<T>) {
      const auto& kv = launch.args.kv;
      const auto strides = kv.page_stride | kv.position_stride | kv.head_stride | launch.args.layer_stride;
      if (reinterpret_cast<std::uintptr_t>(kv.keys) % 16 != 0 || (kv.head_dim | strides) % 8 != 0) return false;
      const auto& weights = launch.args.weights;
      launch.wide = reinterpret_cast<std::uintptr_t>(weights.data()) % 16 == 0 &&
                    (weights.stride(0) | weights.stride(1) | weights.stride(2) | weights.stride(3)) % 8 == 0;
      if (kv.head_dim <= 32) return start<record_tile<T, 32>>(ctx, launch);
      if (kv.head_dim <= 64) return start<record_tile<T, 64>>(ctx, launch);
      if (kv.head_dim <= 128) return start<record_tile<T, 128>>(ctx, launch);
    }
    return false;
  }
  template <class Tile, storage T>
  static bool start(const context<cuda>& ctx, const recompute_steps_launch<T>& launch) {
    const std::size_t shared = Tile::shared_bytes(launch.columns());
    const auto most = static_cast<std::size_t>(ctx.block_shared_bytes());  // the kernel has no other
    if (shared > most) return false;
    queue_kernel(
        ctx, recompute_steps_kernel<Tile, T>,
        {.grid = grid_of(launch), .threads = Tile::threads, .shared_bytes = shared, .most_shared_bytes = most},
        "recompute_steps", launch);
    return true;
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail
