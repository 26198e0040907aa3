// A pass's queries copied to a query log.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "../../view.hpp"
#include "../context.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int keep_queries_threads = 128;

struct keep_queries_launch {
  view<const float, 3, cuda> q;  // [slots, q_heads, head_dim]
  view<float, 3, cuda> to;       // [slots or more, q_heads, head_dim]
};

/// blockIdx.x: a slot; y: a head.
static __global__ void __launch_bounds__(keep_queries_threads)
    keep_queries_kernel(const __grid_constant__ keep_queries_launch launch) {
  for (std::ptrdiff_t d = threadIdx.x; d < launch.q.extent(2); d += keep_queries_threads)
    launch.to(blockIdx.x, blockIdx.y, d) = launch.q(blockIdx.x, blockIdx.y, d);
}

}  // namespace specattn::inline SPECATTN_CODE::detail
