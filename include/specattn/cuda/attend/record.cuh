// The end of a recording: scores become weights, when every row's log-sum-exp is known.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../device/overlap.cuh"
#include "plan.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int attend_recording_threads = 256;
inline constexpr int attend_recording_quads = 4;  ///< 16 bytes each, that a thread has under way
inline constexpr int attend_recording_chunk = 4 * attend_recording_quads * attend_recording_threads;

struct attend_recording_launch {
  view<float, 3, cuda> weights;  ///< scores yet
  view<const std::int32_t, 1, cuda> slot_offsets;
  const attend_finished* finished = nullptr;  ///< [slots, q_heads]
  bool newest = true;

  /// The slot whose weights a recorded row is; -1: none.
  __device__ std::int32_t slot_of(std::int32_t row) const {
    if (!newest) return row < slot_offsets[slot_offsets.extent(0) - 1] ? row : -1;
    const std::int32_t first = slot_offsets[row], behind = slot_offsets[row + 1];
    return first < behind ? behind - 1 : -1;
  }
};

/// Scores [begin, end) of a row, `stride` apart.
__device__ __forceinline__ void finish_weights(float* row, std::ptrdiff_t stride, std::int32_t begin,
                                               std::int32_t end, const attend_finished& by) {
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const auto weight = [&](float score) { return std::exp(score - by.max) * by.scale; };
  if (stride != 1) {
    for (std::int32_t at = begin + thread; at < end; at += attend_recording_threads)
      row[at * stride] = weight(row[at * stride]);
    return;
  }
  const auto before = static_cast<std::int32_t>(reinterpret_cast<std::uintptr_t>(row + begin) / sizeof(float) % 4);
  const std::int32_t left = end - begin;
  float4* quads = reinterpret_cast<float4*>(row + begin - before);  // the first is not ours where before > 0
  float4 of[attend_recording_quads + 1];
  const auto each = [&](auto&& act) {
#pragma unroll
    for (int i = 0; i <= attend_recording_quads; ++i) {
      const std::int32_t quad = i * attend_recording_threads + thread, at = 4 * quad - before;
      if (at < left && (i < attend_recording_quads || thread == 0)) act(of[i], quad, at);
    }
  };
  const auto whole = [&](std::int32_t at) { return at >= 0 && at + 4 <= left; };
  each([&](float4& x, std::int32_t quad, std::int32_t at) {
    if (whole(at)) x = quads[quad];
  });
  each([&](float4& x, std::int32_t quad, std::int32_t at) {
    if (whole(at)) {
      quads[quad] = {weight(x.x), weight(x.y), weight(x.z), weight(x.w)};
      return;
    }
    for (std::int32_t one = at < 0 ? 0 : at; one < at + 4 && one < left; ++one)
      row[begin + one] = weight(row[begin + one]);
  });
}

/// A CTA of (rows * heads, chunks) takes every gridDim.y-th chunk of a recorded row.
template <class = void>
__global__ void __launch_bounds__(attend_recording_threads)
    attend_recording_kernel(const __grid_constant__ attend_recording_launch launch) {
  const auto heads = static_cast<std::uint32_t>(launch.weights.extent(1));
  const std::uint32_t row = blockIdx.x / heads, head = blockIdx.x - row * heads;
  launch_dependents();
  wait_for_previous_kernel();
  const std::int32_t slot = launch.slot_of(static_cast<std::int32_t>(row));
  if (slot < 0) return;
  const attend_finished by = launch.finished[std::ptrdiff_t{slot} * heads + head];
  float* const weights = &launch.weights(row, head, 0);
  const auto step = static_cast<std::int64_t>(gridDim.y) * attend_recording_chunk;
  for (std::int64_t begin = std::int64_t{blockIdx.y} * attend_recording_chunk; begin < by.entries; begin += step) {
    const std::int64_t end = begin + attend_recording_chunk;
    finish_weights(weights, launch.weights.stride(2), static_cast<std::int32_t>(begin),
                   static_cast<std::int32_t>(end < by.entries ? end : by.entries), by);
  }
}

}  // namespace specattn::inline SPECATTN_CODE::detail
