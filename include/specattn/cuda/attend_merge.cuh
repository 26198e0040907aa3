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
inline constexpr int attend_merge_batch = 24;  ///< parts whose sums are on their way at once

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
  if (d != 0) return;
  if (!launch.args.lse.empty()) launch.args.lse(slot, head) = log_sum_exp(state);
  if (launch.records() && launch.recorded(b, row)) {
    const std::int32_t entries = launch.recorded_length(b.kept + launch.slot_of(b, row) + 1);
    launch.exchange.finished[slot * launch.args.q.extent(1) + head] = {state.max, finish_scale(state), entries};
  }
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
      write_elements(launch, b, row, facts.states[row], d, sums);
    } else if (d < launch.exchange.pitch) {
      float* to = launch.exchange.sums + (first_row + row) * launch.exchange.pitch + d;
      if constexpr (Tile::width == 4) *reinterpret_cast<float4*>(to) = {sums[0], sums[1], sums[2], sums[3]};
      if constexpr (Tile::width == 1) *to = sums[0];
    }
  }
}

/// Merges one row of an open block, four elements a lane, in the order of the parts; a warp calls. The sums are on their
/// way while the states are merged.
template <storage T>
__device__ __forceinline__ void merge_row(const attend_launch<T>& launch, const attend_open& open, int row) {
  constexpr int batch = attend_merge_batch;
  const int lane = static_cast<int>(threadIdx.x) % 32, quads = launch.exchange.pitch / 4;
  const std::int32_t count = open.parts.count;
  const auto row_of = [&](std::int32_t part) { return open.parts.place(part) * attend_rows + row; };
  const auto state_of = [&](std::int32_t part) {  // of lane's part in a batch
    return lane < batch && part < count ? launch.exchange.states[row_of(part)] : attention_state{};
  };
  const attention_state mine = state_of(lane);
  attention_state all = mine;
#pragma unroll 1
  for (std::int32_t part = batch + lane; part - lane < count; part += batch) all = merge(all, state_of(part)).state;
#pragma unroll 1
  for (int d = lane; d - lane < quads; d += 32) {
    float sum[4] = {};
#pragma unroll 1
    for (std::int32_t first = 0; first < count; first += batch) {
      float4 of[batch];
      const float4* from = reinterpret_cast<const float4*>(launch.exchange.sums) + row_of(first) * quads + d;
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        of[i] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (first + i < count && d < quads) of[i] = *from;
        from += (first + i == 0 ? 1 : 2) * attend_rows * quads;
      }
      if (first == 0 && d == lane) all = merge_lanes<32>(all);
      const float scale = scale_to(first == 0 ? mine : state_of(first + lane), all.max);
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const float by = __shfl_sync(~0u, scale, i);
        sum[0] = std::fma(by, of[i].x, sum[0]);
        sum[1] = std::fma(by, of[i].y, sum[1]);
        sum[2] = std::fma(by, of[i].z, sum[2]);
        sum[3] = std::fma(by, of[i].w, sum[3]);
      }
    }
    if (d < quads) write_elements(launch, open.block, row, all, 4 * d, sum);
  }
}

/// One CTA of (shares, helpers): the helpers of a share take turns at its open block's rows.
template <storage T>
__global__ void __launch_bounds__(attend_merge_threads)
    attend_merge_kernel(const __grid_constant__ attend_launch<T> launch) {
  wait_for_previous_kernel();
  launch_dependents();
  const attend_open open = launch.exchange.open[blockIdx.x];
  if (open.parts.count == 0) return;
  constexpr int warps = attend_merge_threads / 32;
  for (int row = static_cast<int>(blockIdx.y) * warps + static_cast<int>(threadIdx.x) / 32; row < open.block.rows;
       row += static_cast<int>(gridDim.y) * warps)
    merge_row(launch, open, row);
}

}  // namespace specattn::inline v0_1::detail
