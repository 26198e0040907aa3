// The judgement of a round whose tokens are given: every one is accepted, and what it would have cost to draw is noted.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../device/launch.cuh"
#include "../device/warp.cuh"
#include "layout.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int forced_threads = 256;

struct forced_launch {
  round_arrays round;
  view<const float, 2, cuda> logits;  // [sequences * (drafts + 1), vocab]
};

/// `op` over a CTA's values; every thread receives it.
template <class T, class Op>
__device__ T over_block(T x, T (&memory)[forced_threads / 32], Op op) {
  x = over_warp(x, op);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = x;
  __syncthreads();
  T all = memory[0];
  for (int warp = 1; warp < forced_threads / 32; ++warp) all = op(all, memory[warp]);
  __syncthreads();
  return all;
}

/// -log p of a sequence's i-th forced token, in double as on the CPU. A CTA takes a row of logits.
static __global__ void __launch_bounds__(forced_threads)
    judge_forced_kernel(const __grid_constant__ forced_launch launch) {
  __shared__ float maxima[forced_threads / 32];
  __shared__ double sums[forced_threads / 32];
  const round_arrays& r = launch.round;
  const auto row = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t s = row / r.most_slots(), slot = row % r.most_slots(), drafts = r.input[s].drafts;
  if (slot > drafts) return;
  const view<const float, 1, cuda> logits = launch.logits[row];
  float most = -INFINITY;
  for (std::ptrdiff_t v = threadIdx.x; v < logits.extent(0); v += forced_threads) most = fmaxf(most, logits[v]);
  most = over_block(most, maxima, float_max{});
  double sum = 0.0;
  for (std::ptrdiff_t v = threadIdx.x; v < logits.extent(0); v += forced_threads)
    sum += exp(static_cast<double>(logits[v] - most));  // NaN where a logit is, or none is finite
  sum = over_block(sum, sums, sum_of{});
  if (threadIdx.x != 0) return;
  const std::int32_t token = r.forced[row];
  r.losses[row] = static_cast<float>(log(sum) + static_cast<double>(most) - static_cast<double>(logits[token]));
  if (slot < drafts) return;
  r.accepted[s] = drafts;
  r.next[s] = token;
}

}  // namespace specattn::inline SPECATTN_CODE::detail
