// What follows when a block's positions are done: the warps' or the shares' states merge, results are written.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../attention_state.hpp"
#include "attend_gather.cuh"
#include "attend_plan.cuh"
#include "mma.cuh"

namespace specattn::inline v0_1::detail {

inline constexpr int attend_merge_threads = 128;

/// The state of `Lanes` adjacent lanes' states together, in each of them.
template <int Lanes>
__device__ __forceinline__ attention_state merge_lanes(attention_state mine) {
  float top = mine.max;
#pragma unroll
  for (int distance = 1; distance < Lanes; distance *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
  float sum = mine.sum * scale_to(mine, top);
#pragma unroll
  for (int distance = 1; distance < Lanes; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  return {top, sum};
}

/// Writes `Width` elements of a row's result from its merged sums, and with the first its log-sum-exp.
template <int Width, storage T>
__device__ __forceinline__ void write_elements(const attend_launch<T>& launch, const device_block& b, int row,
                                               attention_state state, int d, const float (&sums)[Width]) {
  const int slot = b.sequence_slot + launch.slot_of(b, row), head = launch.head_of(b, row);
  const float scale = finish_scale(state) * launch.args.kv.value_scale(b.kv_head);
  float* out = &launch.args.out(slot, head, d);
#pragma unroll
  for (int k = 0; k < Width; ++k)
    if (d + k < launch.args.kv.head_dim) out[k * launch.args.out.stride(2)] = sums[k] * scale;
  if (d == 0 && !launch.args.lse.empty()) launch.args.lse(slot, head) = log_sum_exp(state);
}

/// Merges the warps' sums of a part, which is the whole block (`part` negative) or goes to the exchange. All threads
/// call; what the warps left is in place.
template <storage T, class Tile>
__device__ void finish_part(const attend_launch<T>& launch, const Tile& tile, const device_block& b,
                            std::ptrdiff_t part, attend_row_facts& facts) {
  static_assert(32 % Tile::warps == 0 && Tile::warps <= 8, "a row's warps are merged by as many adjacent lanes");
  const int thread = static_cast<int>(threadIdx.x);
  for (int row = thread / Tile::warps; row < Tile::rows; row += Tile::threads / Tile::warps) {
    const attention_state mine = tile.states_of(thread % Tile::warps)[row];
    const attention_state state = merge_lanes<Tile::warps>(mine);
    facts.scales[row][thread % Tile::warps] = scale_to(mine, state.max);
    if (thread % Tile::warps == 0) {
      facts.states[row] = state;
      if (part >= 0) launch.exchange.states[part * attend_rows + row] = state;
    }
  }
  __syncthreads();
  const int pieces = tile.padded_dim() / Tile::width;
#pragma unroll 1
  for (int i = thread; i < b.rows * pieces; i += Tile::threads) {
    const int row = i / pieces, d = i % pieces * Tile::width;
    float sums[Tile::width] = {};
#pragma unroll
    for (int w = 0; w < Tile::warps; ++w) {
      const float* from = tile.sums_of(w, row) + d;
#pragma unroll
      for (int k = 0; k < Tile::width; ++k) sums[k] = std::fma(facts.scales[row][w], from[k], sums[k]);
    }
    if (part < 0) {
      write_elements(launch, b, row, facts.states[row], d, sums);
    } else if (d < launch.args.kv.head_dim) {
      float* to = launch.exchange.sums + (part * attend_rows + row) * launch.exchange.pitch + d;
#pragma unroll
      for (int k = 0; k < Tile::width; ++k) to[k] = sums[k];
    }
  }
}

/// Part p of the block that share blockIdx.x leaves open, in the exchange.
__device__ __forceinline__ std::ptrdiff_t part_at(int p) {
  return 2 * (std::ptrdiff_t{blockIdx.x} + p) + (p == 0 ? 1 : 0);
}

/// A row's state over all parts, in every lane of the warp that calls.
template <storage T>
__device__ __forceinline__ attention_state merged_row(const attend_launch<T>& launch, int parts, int row) {
  attention_state state;
  for (int p = static_cast<int>(threadIdx.x) % 32; p < parts; p += 32)
    state = merge(state, launch.exchange.states[part_at(p) * attend_rows + row]).state;
  return merge_lanes<32>(state);
}

/// Merges one row's sums, four elements a lane, in the order of the parts, and writes it; a warp calls. The sums are
/// on their way while the states are merged.
template <storage T>
__device__ __forceinline__ void merge_row(const attend_launch<T>& launch, const device_block& open, int row) {
  constexpr int batch = 16;
  const int lane = static_cast<int>(threadIdx.x) % 32, pitch = launch.exchange.pitch;
  attention_state state;
#pragma unroll 1
  for (int d = 4 * lane; d - 4 * lane < pitch; d += 128) {
    float sums[4] = {};
#pragma unroll 1
    for (int first = 0; first < open.parts; first += batch) {
      float4 parts[batch];
#pragma unroll
      for (int p = 0; p < batch; ++p) {
        parts[p] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (first + p < open.parts && d < pitch)
          parts[p] = *reinterpret_cast<const float4*>(launch.exchange.sums +
                                                      (part_at(first + p) * attend_rows + row) * pitch + d);
      }
      if (first == 0 && d == 4 * lane) state = merged_row(launch, open.parts, row);
      float mine = 0.0f;
      if (lane < batch && first + lane < open.parts)
        mine = scale_to(launch.exchange.states[part_at(first + lane) * attend_rows + row], state.max);
#pragma unroll
      for (int p = 0; p < batch; ++p) {
        const float scale = __shfl_sync(~0u, mine, p);
        sums[0] = std::fma(scale, parts[p].x, sums[0]);
        sums[1] = std::fma(scale, parts[p].y, sums[1]);
        sums[2] = std::fma(scale, parts[p].z, sums[2]);
        sums[3] = std::fma(scale, parts[p].w, sums[3]);
      }
    }
    if (d < pitch) write_elements(launch, open, row, state, d, sums);
  }
}

/// One CTA of (shares, helpers): the helpers of a share take turns at its open block's rows, and share the recorded
/// rows' sweeps by position.
template <storage T>
__global__ void __launch_bounds__(attend_merge_threads)
    attend_merge_kernel(const __grid_constant__ attend_launch<T> launch) {
  __shared__ attention_state states[attend_rows];
  wait_for_previous_kernel();
  launch_dependents();
  const device_block open = launch.exchange.open[blockIdx.x];
  if (open.parts == 0) return;
  constexpr int warps = attend_merge_threads / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int row = static_cast<int>(blockIdx.y) * warps + warp; row < open.rows;
       row += static_cast<int>(gridDim.y) * warps)
    merge_row(launch, open, row);
  if (!launch.records()) return;
  for (int row = warp; row < open.rows; row += warps) {
    if (launch.recorded(open, row)) states[row] = merged_row(launch, open.parts, row);
  }
  __syncthreads();
  const auto helpers = static_cast<std::int32_t>(gridDim.y);
  const std::int32_t positions = (open.attended + helpers - 1) / helpers;
  const std::int32_t from = static_cast<std::int32_t>(blockIdx.y) * positions;
  for (int row = 0; row < open.rows; ++row) {
    if (!launch.recorded(open, row)) continue;
    const std::int32_t limit = launch.recorded_length(open.kept + launch.slot_of(open, row) + 1);
    finish_weights<attend_merge_threads>(launch.recording_of(open, row), launch.args.recording.weights.stride(2),
                                         from, from + positions < limit ? from + positions : limit, states[row]);
  }
}

}  // namespace specattn::inline v0_1::detail
