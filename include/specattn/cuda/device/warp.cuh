// Reductions and prefix sums over the lanes of a warp. All lanes of a full warp call them together.
#pragma once

#include "requirements.cuh"  // first

#include <cuda_runtime.h>

#include "../../config.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

struct sum_of {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct float_max {  ///< one instruction; of a NaN and a number the number
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

/// x combined by `op` over the warp; every lane receives it. Combines the lanes farthest apart first: a sum of floats
/// depends on it.
template <class T, class Op>
__device__ __forceinline__ T over_warp(T x, Op op) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = op(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}
template <class T>
__device__ __forceinline__ T sum_over_warp(T x) {
  return over_warp(x, sum_of{});
}

/// The same over the lanes that differ in the bits from `First` on, below `Lanes`, nearest lanes first.
template <int First, int Lanes, class T, class Op>
__device__ __forceinline__ T over_lanes(T x, Op op) {
#pragma unroll
  for (int distance = First; distance < Lanes; distance *= 2) x = op(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

/// The sum of x over lanes 0 … the calling one.
template <class T>
__device__ __forceinline__ T prefix_sum_over_warp(T x) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T below = __shfl_up_sync(~0u, x, static_cast<unsigned>(distance));
    if (lane >= distance) x += below;
  }
  return x;
}

}  // namespace specattn::inline SPECATTN_CODE::detail
