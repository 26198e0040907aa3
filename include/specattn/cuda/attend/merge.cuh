// What follows when a block's positions are done: the warps' or the shares' states merge, results are written.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../../attention_state.hpp"
#include "../device/launch.cuh"
#include "../device/overlap.cuh"
#include "../device/warp.cuh"
#include "gather.cuh"
#include "plan.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int attend_merge_threads = 128;
inline constexpr int attend_merge_batch = 16;  ///< parts whose sums are on their way at once
inline constexpr int attend_merge_width = 64;  ///< elements of a row that a warp merges, two a lane

/// The state of `Lanes` adjacent lanes' states together, in each of them.
template <int Lanes>
__device__ __forceinline__ attention_state merge_lanes(attention_state mine) {
  const float top = over_lanes<1, Lanes>(mine.max, float_max{});
  return {top, over_lanes<1, Lanes>(mine.sum * scale_to(mine, top), sum_of{})};
}

/// Writes `Width` elements of a row's result from its merged sums, and with the first its log-sum-exp.
template <int Width, storage T>
__device__ __forceinline__ void write_elements(const attend_launch<T>& launch, std::int32_t slot, std::int32_t head,
                                               std::int32_t entries, attention_state state, int d,
                                               const float (&sums)[Width]) {
  const float scale = finish_scale(state) * launch.args.kv.value_scale(head / launch.rows.group);
  float* out = &launch.args.out(slot, head, d);
#pragma unroll
  for (int k = 0; k < Width; ++k)
    if (d + k < launch.args.kv.head_dim) out[k * launch.args.out.stride(2)] = sums[k] * scale;
  if (d != 0) return;
  if (!launch.args.lse.empty()) launch.args.lse(slot, head) = log_sum_exp(state);
  if (entries >= 0)
    launch.exchange.finished[slot * launch.args.q.extent(1) + head] = {state.max, finish_scale(state), entries};
}

/// Merges the warps' sums of a part, which is the whole block (`place` negative) or goes to that place of the exchange.
/// All threads call; what the warps left is in place.
template <storage T, class Tile>
__device__ void finish_part(const attend_launch<T>& launch, const Tile& tile, const device_block& b,
                            std::int32_t place, attend_row_facts& facts) {
  const std::ptrdiff_t first_row = std::ptrdiff_t{place} * attend_rows;
  static_assert(32 % Tile::warps == 0 && Tile::warps <= 8, "a row's warps are merged by as many adjacent lanes");
  const int thread = static_cast<int>(threadIdx.x);
  for (int row = thread / Tile::warps; row < Tile::rows; row += Tile::threads / Tile::warps) {
    const attention_state mine = tile.states_of(thread % Tile::warps)[row];
    const attention_state state = merge_lanes<Tile::warps>(mine);
    facts.scales[row][thread % Tile::warps] = scale_to(mine, state.max);
    if (thread % Tile::warps == 0) {
      facts.states[row] = state;
      if (place >= 0) launch.exchange.states[first_row + row] = state;
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
    if (place < 0) {
      write_elements(launch, b.sequence_slot + launch.slot_of(b, row), launch.head_of(b, row),
                     launch.entries_of(b, row), facts.states[row], d, sums);
    } else if (d < launch.exchange.pitch) {
      float* to = launch.exchange.sums + (first_row + row) * launch.exchange.pitch + d;
      if constexpr (Tile::width == 4) *reinterpret_cast<float4*>(to) = {sums[0], sums[1], sums[2], sums[3]};
      if constexpr (Tile::width == 1) *to = sums[0];
    }
  }
}

/// Merges elements from `first` on of a row of q, in the order of the parts; a warp calls. The sums are on their way
/// while the states are merged. Nothing read stays in the L1, where a rehearsal's would be old.
template <storage T>
__device__ __forceinline__ void merge_row(const attend_launch<T>& launch, std::int32_t slot, std::int32_t head,
                                          int first, const attend_row_parts& parts, bool write) {
  constexpr int batch = attend_merge_batch;
  const int lane = static_cast<int>(threadIdx.x) % 32, d = first + 2 * lane;
  const std::ptrdiff_t pitch = launch.exchange.pitch;
  const bool inside = d < pitch;
  const auto row_of = [&](std::int32_t part) { return part_place(parts.first, part) * attend_rows + parts.row; };
  const auto state_of = [&](std::int32_t part) {  // of lane's part in a batch
    if (lane >= batch || part >= parts.count) return attention_state{};
    const float2 state = __ldcg(reinterpret_cast<const float2*>(launch.exchange.states + row_of(part)));
    return attention_state{state.x, state.y};
  };
  const attention_state mine = state_of(lane);
  attention_state all = mine;
#pragma unroll 1
  for (std::int32_t part = batch + lane; part - lane < parts.count; part += batch)
    all = merge(all, state_of(part)).state;
  float sum[2] = {};
#pragma unroll 1
  for (std::int32_t begin = 0; begin < parts.count; begin += batch) {
    float2 of[batch];
    const float* from = launch.exchange.sums + row_of(begin) * pitch + d;
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      of[i] = {0.0f, 0.0f};
      if (begin + i < parts.count && inside) of[i] = __ldcg(reinterpret_cast<const float2*>(from));
      from += (begin + i == 0 ? 1 : 2) * attend_rows * pitch;
    }
    if (begin == 0) all = merge_lanes<32>(all);
    const float scale = scale_to(begin == 0 ? mine : state_of(begin + lane), all.max);
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const float by = __shfl_sync(~0u, scale, i);
      sum[0] = std::fma(by, of[i].x, sum[0]);
      sum[1] = std::fma(by, of[i].y, sum[1]);
    }
  }
  if (write && inside) write_elements(launch, slot, head, parts.entries, all, d, sum);
}

/// CTAs that merge a pass's rows.
template <storage T>
unsigned merging_ctas(const attend_launch<T>& launch) {
  const std::ptrdiff_t warps = blocks_of(launch.exchange.pitch, attend_merge_width);
  return blocks_of(launch.args.q.extent(0) * launch.args.q.extent(1) * warps, attend_merge_threads / 32);
}

/// A warp merges some elements of a row of q, where a sequence has that row and its block was cut into parts. Before it waits
/// for the previous kernel it executes one dummy merge and discards the result: that warms the instruction and constant
/// caches, whose misses otherwise take longer than the parts.
template <storage T>
__global__ void __launch_bounds__(attend_merge_threads)
    attend_merge_kernel(const __grid_constant__ attend_launch<T> launch) {
  const auto q_heads = static_cast<std::uint32_t>(launch.args.q.extent(1));
  const auto warps = static_cast<std::uint32_t>(launch.exchange.pitch + attend_merge_width - 1) / attend_merge_width;
  const std::uint32_t warp = (blockIdx.x * attend_merge_threads + threadIdx.x) / 32, row = warp / warps;
  const auto slot = static_cast<std::int32_t>(row / q_heads);
  const auto head = static_cast<std::int32_t>(row - static_cast<std::uint32_t>(slot) * q_heads);
  const auto first = static_cast<int>(warp - row * warps) * attend_merge_width;
  launch_dependents();
  attend_row_parts parts{0, slot < launch.args.q.extent(0) ? 1 : 0, 0, -1};
#pragma unroll 1
  for (bool rehearsal = true;; rehearsal = false) {
    merge_row(launch, slot, head, first, parts, !rehearsal);
    if (!rehearsal) return;
    wait_for_previous_kernel();
    if (slot >= launch.args.q.extent(0)) return;
    const auto& offsets = launch.args.slot_offsets;
    const std::int32_t begin = offsets[0], end = offsets[offsets.extent(0) - 1];
    parts = launch.exchange.rows[row];
    if (slot < begin || slot >= end || parts.count <= 1) return;
  }
}

}  // namespace specattn::inline SPECATTN_CODE::detail
