// The checked launch of a kernel that takes one argument struct; early, where the kernel says what it waits for.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "context.cuh"

namespace specattn::inline v0_1::detail {

/// Queues `kernel` on the context's stream. An empty grid launches nothing. \throws device_error naming the operation
template <class Launch>
void start_kernel(const context<cuda>& ctx, void (*kernel)(Launch), dim3 grid, int threads, const Launch& launch,
                  const char* operation, std::size_t shared_bytes = 0, bool early = false) {
  if (grid.x == 0 || grid.y == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = ctx.stream();
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = early && ctx.code_major() >= 9 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, launch), operation);
}
/// The same for a kernel that calls wait_for_previous_kernel() before it touches what the one before it on the stream
/// touches: its CTAs are placed as soon as all of that one's have called launch_dependents() or ended. Where that one
/// calls it behind its own wait, everything older is done when a CTA starts; where it calls it first, nothing need be.
template <class Launch>
void start_kernel_early(const context<cuda>& ctx, void (*kernel)(Launch), dim3 grid, int threads,
                        const Launch& launch, const char* operation, std::size_t shared_bytes = 0) {
  start_kernel(ctx, kernel, grid, threads, launch, operation, shared_bytes, true);
}

/// How many blocks of `size` cover `count`.
inline unsigned blocks_of(std::ptrdiff_t count, std::ptrdiff_t size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

}  // namespace specattn::inline v0_1::detail
