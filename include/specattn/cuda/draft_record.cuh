// What a draft's steps leave behind on the device: masses of recorded rows, and a sparse draft's own lists.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../selection.hpp"
#include "round_layout.cuh"

namespace specattn::inline v0_1::detail {

inline constexpr int record_threads = 256;

__device__ __forceinline__ float warp_sum(float value) {
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
  return value;
}

/// Sums of recorded rows over the round's prefix.
struct masses_launch {
  round_arrays round;
  const float* weights;                  // [steps, rows of a step, capacity]
  float* masses;                         // [steps, rows of a step]
  std::ptrdiff_t rows, steps, capacity;  // rows of a step: layers * sequences * heads
  std::int32_t heads;
};

/// A warp takes a row. It sums to one over its prefix and tail, and the tail is short: unless the tail holds nearly
/// everything, the mass is what it leaves.
static __global__ void __launch_bounds__(record_threads) masses_kernel(const __grid_constant__ masses_launch launch) {
  const std::ptrdiff_t row = std::ptrdiff_t{blockIdx.x} * (record_threads / 32) + threadIdx.x / 32;
  if (row >= launch.steps * launch.rows) return;
  const auto lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  const auto step = static_cast<std::int32_t>(row / launch.rows);
  const auto s = static_cast<std::int32_t>(row % launch.rows / launch.heads % launch.round.sequences);
  const std::int32_t prefix = launch.round.input[s].text_len - 1, length = prefix + 1 + step;
  const float* weights = launch.weights + row * launch.capacity;
  float tail = 0.0f;
  for (std::int32_t i = prefix + lane; i < length; i += 32) tail += weights[i];
  float mass = 1.0f - warp_sum(tail);
  if (mass <= 0.01f) {  // the difference would have lost its digits
    mass = 0.0f;
    for (std::int32_t i = lane; i < prefix; i += 32) mass += weights[i];
    mass = warp_sum(mass);
  }
  if (lane == 0) launch.masses[row] = mass;
}

/// The length of what a sparse draft's selection is made from: the whole text, cached by the first step.
struct own_lengths_launch {
  round_arrays round;
  std::int32_t* lengths;  // [layers, sequences, kv_heads]
  std::int32_t groups, kv_heads;
};

static __global__ void __launch_bounds__(record_threads)
    own_lengths_kernel(const __grid_constant__ own_lengths_launch launch) {
  const auto g = static_cast<std::int32_t>(blockIdx.x * record_threads + threadIdx.x);
  if (g < launch.groups)
    launch.lengths[g] = launch.round.input[g / launch.kv_heads % launch.round.sequences].text_len;
}

/// The heads of a group added up: what a sparse draft's lists are selected from.
struct add_heads_launch {
  round_arrays round;
  const float* weights;  // [groups, heads of a group, capacity] the first step's: each row sums to one over the text
  float* sums;           // [groups, capacity]
  std::ptrdiff_t capacity;
  std::int32_t heads, kv_heads;
};

/// A thread adds four positions; blockIdx.y is the group.
static __global__ void __launch_bounds__(record_threads)
    add_heads_kernel(const __grid_constant__ add_heads_launch launch) {
  const std::ptrdiff_t group = blockIdx.y, at = (std::ptrdiff_t{blockIdx.x} * record_threads + threadIdx.x) * 4;
  const auto s = static_cast<std::int32_t>(group / launch.kv_heads % launch.round.sequences);
  if (at >= launch.round.input[s].text_len) return;
  const float* const rows = launch.weights + group * launch.heads * launch.capacity + at;
  float4 sum = *reinterpret_cast<const float4*>(rows);
  for (std::int32_t head = 1; head < launch.heads; ++head) {
    const float4 more = *reinterpret_cast<const float4*>(rows + head * launch.capacity);
    sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
  }
  *reinterpret_cast<float4*>(launch.sums + group * launch.capacity + at) = sum;
}

/// A sparse step: its recorded rows, and the lists it read.
struct sparse_step_launch {
  round_arrays round;
  std::int32_t step;
  selection_view<cuda> kept;  // [layers * sequences * kv_heads]
  const float* recorded;      // [layers * sequences * heads, capacity] entries as listed
  float* weights;             // [layers * sequences * heads, capacity] the first step's
  float* masses;              // [layers * sequences * heads] the first step's, and what was added since
  std::ptrdiff_t rows, capacity;
  std::int32_t heads, kv_heads;
};

/// Adds a sparse step's weights over its kept positions to the first step's row, scaled to that row's mass. A CTA takes
/// a row.
static __global__ void __launch_bounds__(record_threads)
    add_kept_kernel(const __grid_constant__ sparse_step_launch launch) {
  __shared__ float parts[record_threads / 32];
  const std::ptrdiff_t row = blockIdx.x;
  const std::int32_t group_heads = launch.heads / launch.kv_heads;
  const std::ptrdiff_t list = row / launch.heads * launch.kv_heads + row % launch.heads / group_heads;
  const auto s = static_cast<std::int32_t>(row / launch.heads % launch.round.sequences);
  const std::int32_t prefix = launch.round.input[s].text_len - 1;
  const std::int32_t listed = launch.kept.counts[list];
  const std::int32_t count = listed == keep_all ? prefix : listed;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const float* recorded = launch.recorded + row * launch.capacity;
  const auto position = [&](std::int32_t i) { return listed == keep_all ? i : launch.kept.positions(list, i); };
  float sum = 0.0f;
  for (std::int32_t i = thread; i < count; i += record_threads) sum += position(i) < prefix ? recorded[i] : 0.0f;
  sum = warp_sum(sum);
  if (thread % 32 == 0) parts[thread / 32] = sum;
  __syncthreads();
  sum = 0.0f;
  for (const float part : parts) sum += part;
  if (!(sum > 0.0f)) return;
  const float share =
      launch.masses[row] / static_cast<float>(launch.step);  // of the first row: so many are in already
  for (std::int32_t i = thread; i < count; i += record_threads) {
    if (position(i) < prefix) launch.weights[row * launch.capacity + position(i)] += share / sum * recorded[i];
  }
  __syncthreads();
  if (thread == 0) launch.masses[row] += share;
}

/// Before a sparse step: its lists take in what was cached since they were selected.
struct step_lists_launch {
  round_arrays round;
  selection_view<cuda> kept;  // [layers * sequences * kv_heads]
  std::int32_t* selected;     // [same] their counts when they were selected
  std::int32_t kv_heads;
  bool fresh;  // they have just been
};

static __global__ void __launch_bounds__(record_threads)
    step_lists_kernel(const __grid_constant__ step_lists_launch launch) {
  const auto g = static_cast<std::int32_t>(blockIdx.x * record_threads + threadIdx.x);
  if (g >= launch.kept.groups()) return;
  const std::int32_t s = g / launch.kv_heads % launch.round.sequences;
  if (launch.fresh) launch.selected[g] = launch.kept.counts[g];
  grow_list(launch.kept, g, launch.selected[g], launch.round.recorded_lens[s], launch.round.draft_lens[s]);
}

// ---- the verify pass's lists ----------------------------------------------------------------------------------

struct kept_launch {
  round_arrays round;
  selection_view<cuda> kept;  // [layers * sequences * kv_heads]; empty: the round is dense
  std::int32_t* selected;     // [same] their counts when they were selected
  selection_view<cuda> own;   // a sparse draft's, as they were selected; empty: there is none
  std::int32_t layers, kv_heads, dense_layers;
  std::int32_t own_layers, own_kv_heads;
};

/// Lists that are reused take in the positions since. The first layers, and sequences whose round is dense, keep
/// everything.
static __global__ void __launch_bounds__(record_threads)
    settle_lists_kernel(const __grid_constant__ kept_launch launch) {
  const auto g = static_cast<std::int32_t>(blockIdx.x * record_threads + threadIdx.x);
  if (g >= launch.kept.groups()) return;
  const round_arrays& r = launch.round;
  const std::int32_t layer = g / launch.kv_heads / r.sequences, s = g / launch.kv_heads % r.sequences;
  if (r.reuse) grow_list(launch.kept, g, launch.selected[g], r.recorded_lens[s] - 1, r.prefix_lens[s]);
  if (layer < launch.dense_layers || r.input[s].dense != 0) launch.kept.counts[g] = keep_all;
  if (!r.reuse) launch.selected[g] = launch.kept.counts[g];
}

__device__ __forceinline__ std::int64_t warp_sum(std::int64_t value) {
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
  return value;
}

/// Entries of one sequence's lists, and whether none of them leaves anything out. For one warp.
__device__ inline std::int64_t entries_of(const selection_view<cuda>& lists, std::int32_t s, std::int32_t sequences,
                                          std::int32_t layers, std::int32_t kv_heads, std::int32_t everything,
                                          bool& all) {
  std::int64_t entries = 0;
  bool every = true;
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < layers * kv_heads; i += 32) {
    const std::int32_t count = lists.counts[(i / kv_heads * sequences + s) * kv_heads + i % kv_heads];
    entries += count == keep_all ? everything : count;
    every = every && count == keep_all;
  }
  all = __all_sync(~0u, every) != 0;
  return warp_sum(entries);
}

/// What the host is told. A warp takes a sequence.
static __global__ void __launch_bounds__(32) report_kernel(const __grid_constant__ kept_launch launch) {
  const round_arrays& r = launch.round;
  const auto s = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t prefix = r.input[s].text_len - 1;
  sequence_output out{};
  bool all = true;
  out.rows_read = std::int64_t{launch.layers} * launch.kv_heads * prefix;
  if (!launch.kept.counts.empty())
    out.rows_read = entries_of(launch.kept, s, r.sequences, launch.layers, launch.kv_heads, prefix, all);
  out.rows_read += std::int64_t{launch.layers} * launch.kv_heads * (r.input[s].drafts + 1);
  out.dense = all ? 1 : 0;
  if (!launch.own.counts.empty()) {
    const std::int32_t length = r.recorded_lens[s];
    bool ignored = true;
    out.draft_left_out =
        std::int64_t{launch.own_layers} * launch.own_kv_heads * length -
        entries_of(launch.own, s, r.sequences, launch.own_layers, launch.own_kv_heads, length, ignored);
  }
  out.accepted = r.accepted[s];
  out.next = r.next[s];
  for (std::int32_t i = 0; i < r.input[s].drafts; ++i) out.undrafted |= r.drafted[s * r.drafts + i] < 0 ? 1 : 0;
  if (threadIdx.x == 0) r.output[s] = out;
}

}  // namespace specattn::inline v0_1::detail
