// Lists of a round on the device: a sparse draft's own, the verify pass's, and what the host is told of them.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../../recompute.hpp"
#include "../../selection.hpp"
#include "../device/launch.cuh"
#include "../device/warp.cuh"
#include "layout.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int record_threads = 256;

/// Before a round's lists are selected: what they are selected from is its prefix, or nothing where it took no step.
struct own_lengths_launch {
  round_arrays round;
  std::int32_t* lengths;  // [layers, sequences, kv_heads]
  std::int32_t groups, kv_heads;
};

static __global__ void __launch_bounds__(record_threads)
    own_lengths_kernel(const __grid_constant__ own_lengths_launch launch) {
  const auto g = static_cast<std::int32_t>(blockIdx.x * record_threads + threadIdx.x);
  if (g < launch.groups) launch.lengths[g] = launch.round.weighed_lens[g / launch.kv_heads % launch.round.sequences];
}

/// The mean of a group's heads, each of unit mass: what a sparse draft's lists are selected from.
struct add_heads_launch {
  round_arrays round;
  const fp16* weights;      // [groups, heads of a group, capacity]
  const float* masses;      // [groups, heads of a group]
  fp16* sums;               // [groups, capacity]
  std::ptrdiff_t capacity;  // whole 16 bytes
  std::int32_t heads, kv_heads;
  static constexpr bool folds_rows = true;  // layers * sequences * kv_heads may be more than a grid's y
};

inline constexpr int add_heads_positions = 8;  ///< of a thread: 16 bytes

/// The folded row is the group.
static __global__ void __launch_bounds__(record_threads)
    add_heads_kernel(const __grid_constant__ add_heads_launch launch) {
  constexpr int width = add_heads_positions;
  struct alignas(16) piece {
    fp16 elements[width];
  };
  const std::ptrdiff_t group = folded_row();
  const std::ptrdiff_t at = (std::ptrdiff_t{blockIdx.x} * record_threads + threadIdx.x) * width;
  if (at >= launch.round.weighed_lens[group / launch.kv_heads % launch.round.sequences]) return;
  const fp16* const rows = launch.weights + group * launch.heads * launch.capacity + at;
  float sums[width] = {};
#pragma unroll 4
  for (std::int32_t head = 0; head < launch.heads; ++head) {
    const auto more = *reinterpret_cast<const piece*>(rows + head * launch.capacity);
    const float mass = launch.masses[group * launch.heads + head];
    const float factor = mass > 0.0f ? 1.0f / (mass * recorded_unit<cuda> * static_cast<float>(launch.heads)) : 0.0f;
    for (int i = 0; i < width; ++i) sums[i] = fmaf(factor, to_float(more.elements[i]), sums[i]);
  }
  piece out;
  for (int i = 0; i < width; ++i) out.elements[i] = from_float<fp16>(sums[i]);
  *reinterpret_cast<piece*>(launch.sums + group * launch.capacity + at) = out;
}

/// A sparse draft's lists: as they stand in `kept`, grown to a step's prefix, they are their first `selected` entries,
/// which were selected from `lengths` positions, and all since.
struct step_lists_launch {
  round_arrays round;
  selection_view<cuda> kept;     // [layers * sequences * kv_heads]
  const std::int32_t* selected;  // [same] counts
  const std::int32_t* lengths;   // [same]
  std::int32_t* left_out;        // [same] positions that they leave out
  std::int32_t kv_heads;
};

/// Before a sparse step. A warp takes a list.
static __global__ void __launch_bounds__(record_threads)
    step_lists_kernel(const __grid_constant__ step_lists_launch launch) {
  const auto g = static_cast<std::int32_t>(blockIdx.x * (record_threads / 32) + threadIdx.x / 32);
  const auto lane = static_cast<std::int32_t>(threadIdx.x % 32);
  if (g >= launch.kept.groups()) return;
  const std::int32_t selected = launch.selected[g], length = launch.lengths[g];
  if (lane == 0) launch.left_out[g] = selected == keep_all ? 0 : length - selected;
  grow_list(launch.kept, g, selected, length, launch.round.draft_lens[g / launch.kv_heads % launch.round.sequences],
            lane, 32);
}

// ---- the verify pass's lists ----------------------------------------------------------------------------------

struct kept_launch {
  round_arrays round;
  selection_view<cuda> kept;  // [layers * sequences * kv_heads]; empty: the round is dense
  std::int32_t* selected;     // [same] their counts when they were selected
  const std::int32_t*
      own_left_out;  // [own_layers, sequences, own_kv_heads] of a sparse draft's lists; null: there is none
  std::int32_t layers, kv_heads, dense_layers;
  std::int32_t own_layers, own_kv_heads;
};

/// Extends reused lists by the positions appended since they were selected. Makes lists of the first layers, and of sequences
/// whose round is dense or whose draft failed, keep everything. One warp a list.
static __global__ void __launch_bounds__(record_threads)
    settle_lists_kernel(const __grid_constant__ kept_launch launch) {
  const auto g = static_cast<std::int32_t>(blockIdx.x * (record_threads / 32) + threadIdx.x / 32);
  const auto lane = static_cast<std::int32_t>(threadIdx.x % 32);
  if (g >= launch.kept.groups()) return;
  const round_arrays& r = launch.round;
  const std::int32_t layer = g / launch.kv_heads / r.sequences, s = g / launch.kv_heads % r.sequences;
  if (r.reuse) grow_list(launch.kept, g, launch.selected[g], r.recorded_lens[s] - 1, r.prefix_lens[s], lane, 32);
  if (lane != 0) return;
  if (layer < launch.dense_layers || r.input[s].dense != 0 || judged_drafts(r, s) < r.input[s].drafts)
    launch.kept.counts[g] = keep_all;
  if (!r.reuse) launch.selected[g] = launch.kept.counts[g];
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
  return sum_over_warp(entries);
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
  if (launch.own_left_out != nullptr) {
    std::int64_t left_out = 0;
    for (auto i = static_cast<std::int32_t>(threadIdx.x); i < launch.own_layers * launch.own_kv_heads; i += 32)
      left_out += launch.own_left_out[(i / launch.own_kv_heads * r.sequences + s) * launch.own_kv_heads +
                                      i % launch.own_kv_heads];
    out.draft_left_out = sum_over_warp(left_out);
  }
  out.next = r.next[s];
  out.accepted = out.next == no_token ? -1 : r.accepted[s];
  out.drafted = judged_drafts(r, s);
  __syncwarp();
  if (threadIdx.x != 0) return;
  r.accepted[s] = out.accepted;  // guides are told too
  r.output[s] = out;
}

}  // namespace specattn::inline SPECATTN_CODE::detail
