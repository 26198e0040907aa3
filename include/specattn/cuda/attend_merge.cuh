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

/// Writes four elements a lane of a row's result from its merged sums, and its log-sum-exp; a warp calls.
template <storage T>
__device__ __forceinline__ void write_elements(const attend_launch<T>& launch, const device_block& b, int row,
                                               attention_state state, int first_d, const float (&sums)[4]) {
  const int slot = b.sequence_slot + launch.slot_of(b, row), head = launch.head_of(b, row);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float scale = finish_scale(state);
  float* out = &launch.args.out(slot, head, 0);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int d = first_d + 32 * k + lane;
    if (d < launch.args.kv.head_dim) out[d * launch.args.out.stride(2)] = sums[k] * scale;
  }
  if (first_d == 0 && lane == 0 && !launch.args.lse.empty()) launch.args.lse(slot, head) = log_sum_exp(state);
}

/// Merges the warps' sums of a part, which is the whole block (`part` negative) or goes to the exchange.
template <storage T, class Tile>
__device__ void finish_part(const attend_launch<T>& launch, const Tile& tile, const device_block& b,
                            std::ptrdiff_t part, attend_row_facts& facts) {
  const int lane = static_cast<int>(threadIdx.x) % 32, head_dim = launch.args.kv.head_dim;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < b.rows; row += Tile::warps) {
    attention_state state;
    float scales[Tile::warps];
#pragma unroll
    for (int w = 0; w < Tile::warps; ++w) state = merge(state, tile.states_of(w)[row]).state;
#pragma unroll
    for (int w = 0; w < Tile::warps; ++w) scales[w] = merge(state, tile.states_of(w)[row]).scale_b;
    const std::ptrdiff_t at = part * attend_rows + row;
    for (int first_d = 0; first_d < head_dim; first_d += 128) {
      float sums[4] = {};
#pragma unroll
      for (int w = 0; w < Tile::warps; ++w) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int d = first_d + 32 * k + lane;
          if (d < head_dim) sums[k] = std::fma(scales[w], tile.sums_of(w, row)[d], sums[k]);
        }
      }
      if (part < 0) {
        write_elements(launch, b, row, state, first_d, sums);
        continue;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int d = first_d + 32 * k + lane;
        if (d < head_dim) launch.exchange.sums[at * head_dim + d] = sums[k];
      }
    }
    if (lane != 0) continue;
    if (part < 0) {
      facts.states[row] = state;
    } else {
      launch.exchange.states[at] = state;
    }
  }
}

/// Part p of the block that share blockIdx.x leaves open, in the exchange.
__device__ __forceinline__ std::ptrdiff_t part_at(int p) {
  return p == 0 ? 2 * std::ptrdiff_t{blockIdx.x} + 1 : 2 * (std::ptrdiff_t{blockIdx.x} + p);
}

/// A row's state over all parts, in every lane of the warp that calls.
template <storage T>
__device__ attention_state merged_row(const attend_launch<T>& launch, int parts, int row) {
  attention_state state;
  for (int p = static_cast<int>(threadIdx.x) % 32; p < parts; p += 32)
    state = merge(state, launch.exchange.states[part_at(p) * attend_rows + row]).state;
  for (int distance = 16; distance > 0; distance /= 2) {
    const attention_state other = {__shfl_xor_sync(~0u, state.max, distance),
                                   __shfl_xor_sync(~0u, state.sum, distance)};
    state = merge(state, other).state;
  }
  return state;
}

/// Merges one row's sums, four elements a lane at a time, in the order of the parts, and writes it; a warp calls.
template <storage T>
__device__ void merge_row(const attend_launch<T>& launch, const divided_block& open, int row) {
  const int lane = static_cast<int>(threadIdx.x) % 32, head_dim = launch.args.kv.head_dim;
  const attention_state state = merged_row(launch, open.parts, row);
  for (int first_d = 0; first_d < head_dim; first_d += 128) {
    float sums[4] = {};
    for (int first = 0; first < open.parts; first += 32) {
      float mine = 0.0f;
      if (first + lane < open.parts)
        mine = merge(state, launch.exchange.states[part_at(first + lane) * attend_rows + row]).scale_b;
      const int count = open.parts - first < 32 ? open.parts - first : 32;
#pragma unroll 8
      for (int p = 0; p < count; ++p) {
        const float scale = __shfl_sync(~0u, mine, p);
        const float* from = launch.exchange.sums + (part_at(first + p) * attend_rows + row) * head_dim;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int d = first_d + 32 * k + lane;
          if (d < head_dim) sums[k] = std::fma(scale, from[d], sums[k]);
        }
      }
    }
    write_elements(launch, open.block, row, state, first_d, sums);
  }
}

/// One CTA of (shares, helpers): the helpers of a share take turns at its open block's rows, and share the recorded
/// rows' sweeps by position.
template <storage T>
__global__ void __launch_bounds__(attend_merge_threads)
    attend_merge_kernel(const __grid_constant__ attend_launch<T> launch) {
  __shared__ attention_state states[attend_rows];
  wait_for_previous_kernel();
  const divided_block open = launch.exchange.divided[blockIdx.x];
  if (open.parts == 0) return;
  constexpr int warps = attend_merge_threads / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int row = static_cast<int>(blockIdx.y) * warps + warp; row < open.block.rows;
       row += static_cast<int>(gridDim.y) * warps)
    merge_row(launch, open, row);
  if (!launch.records()) return;
  for (int row = warp; row < open.block.rows; row += warps) {
    if (launch.recorded(open.block, row)) states[row] = merged_row(launch, open.parts, row);
  }
  __syncthreads();
  const auto helpers = static_cast<std::int32_t>(gridDim.y);
  const std::int32_t positions = (open.block.attended + helpers - 1) / helpers;
  const std::int32_t from = static_cast<std::int32_t>(blockIdx.y) * positions;
  for (int row = 0; row < open.block.rows; ++row) {
    if (!launch.recorded(open.block, row)) continue;
    const std::int32_t limit = open.block.kept + launch.slot_of(open.block, row) + 1;
    finish_weights(launch.args.recording.weights, launch.recording_of(open.block, row), from,
                   from + positions < limit ? from + positions : limit, states[row], static_cast<int>(threadIdx.x),
                   attend_merge_threads);
  }
}

}  // namespace specattn::inline v0_1::detail
