// The checked launch of a small kernel that takes one argument struct.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "context.cuh"

namespace specattn::inline v0_1::detail {

/// Queues `kernel` on the context's stream. An empty grid launches nothing. \throws device_error naming the operation
template <class Launch>
void start_kernel(const context<cuda>& ctx, void (*kernel)(Launch), dim3 grid, int threads, const Launch& launch,
                  const char* operation, std::size_t shared_bytes = 0) {
  if (grid.x == 0 || grid.y == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = ctx.stream();
  check_cuda(cudaLaunchKernelEx(&config, kernel, launch), operation);
}

/// How many blocks of `size` cover `count`.
inline unsigned blocks_of(std::ptrdiff_t count, std::ptrdiff_t size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

}  // namespace specattn::inline v0_1::detail
