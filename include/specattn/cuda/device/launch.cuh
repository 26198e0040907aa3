// The checked launch of a kernel: every one of the library's goes through here. On the context's device, within the limits
// of a grid, as early as the kernel allows.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../context.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// What a launch is besides its kernel and arguments.
struct launch_shape {
  dim3 grid;
  int threads = 0;
  std::size_t shared_bytes = 0;  ///< dynamic
  /// The most of them that any launch of the kernel on the device asks for; 0 where 48 KB are enough for all. The limit is
  /// an attribute of the function, for all host threads at once: it is always set to this, so that none lowers it between
  /// another's call and its launch.
  std::size_t most_shared_bytes = 0;
  int cluster = 0;  ///< CTAs along x, where code for clusters runs; 0: the kernel knows none
  /// For a kernel that calls wait_for_previous_kernel() before it touches what its predecessor on the stream touches: its
  /// CTAs are placed as soon as all of the predecessor's have called launch_dependents() or ended. If the predecessor calls
  /// it after its own wait, all older kernels have ended when a CTA starts; if it calls it first, none need have.
  bool early = false;
};

/// What variables of `bytes` in a kernel's static shared memory take there: from CUDA 13 on, whole kilobytes on Hopper.
constexpr std::size_t static_shared_bytes(std::size_t bytes) { return (bytes + 1023) / 1024 * 1024; }

inline constexpr unsigned most_grid_rows = 65535;  ///< y and z of a grid; x goes up to 2^31 - 1

/// Queues `kernel` on the context's stream. An empty grid launches nothing. \throws device_error naming the operation,
/// contract_error where a grid or the device's shared memory is too small for it
template <class... Arguments>
void queue_kernel(const context<cuda>& ctx, void (*kernel)(Arguments...), const launch_shape& shape,
                  const char* operation, const std::type_identity_t<Arguments>&... arguments) {
  const dim3 grid = shape.grid;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  expects(grid.x <= INT32_MAX && grid.y <= most_grid_rows && grid.z <= most_grid_rows, operation, ": ", grid.x,
          " by ", grid.y, " by ", grid.z, " CTAs are more than one launch takes (", INT32_MAX, " by 65535 by 65535)");
  expects(shape.shared_bytes <= static_cast<std::size_t>(ctx.block_shared_bytes()), operation, ": a CTA needs ",
          shape.shared_bytes, " bytes of shared memory, the device has ", ctx.block_shared_bytes());
  const device_guard here(ctx.device());
  if (shape.most_shared_bytes > 0)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shape.most_shared_bytes)),
               operation);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = ctx.stream();
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (shape.cluster > 0 && ctx.code_major() >= 9) {
    cudaLaunchAttribute& size = attributes[config.numAttrs++];
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
  }
  if (shape.early && ctx.code_major() >= 9) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), operation);
}

/// A grid whose y may be more than one launch takes: the same CTAs with y divided over y and z, for kernels that read
/// folded_row(). A y without such a division (a large prime factor) stays, and is refused.
inline dim3 folded(dim3 grid) {
  if (grid.y <= most_grid_rows || grid.z != 1) return grid;
  for (unsigned z = (grid.y - 1) / most_grid_rows + 1; z <= most_grid_rows; ++z) {
    if (grid.y % z == 0) return dim3(grid.x, grid.y / z, z);
  }
  return grid;
}
/// The y of a CTA before its grid was folded.
__device__ __forceinline__ std::ptrdiff_t folded_row() { return std::ptrdiff_t{blockIdx.z} * gridDim.y + blockIdx.y; }

/// Queues a kernel that takes one argument struct. One that has a member `folds_rows` is for kernels that read
/// folded_row().
template <class Launch>
void start_kernel(const context<cuda>& ctx, void (*kernel)(Launch), dim3 grid, int threads, const Launch& launch,
                  const char* operation, std::size_t shared_bytes = 0, bool early = false) {
  if constexpr (requires { Launch::folds_rows; }) grid = folded(grid);
  queue_kernel(ctx, kernel, {.grid = grid, .threads = threads, .shared_bytes = shared_bytes, .early = early},
               operation, launch);
}
/// The same, early: see launch_shape.
template <class Launch>
void start_kernel_early(const context<cuda>& ctx, void (*kernel)(Launch), dim3 grid, int threads,
                        const Launch& launch, const char* operation, std::size_t shared_bytes = 0) {
  start_kernel(ctx, kernel, grid, threads, launch, operation, shared_bytes, true);
}

/// How many blocks of `size` cover `count`.
inline unsigned blocks_of(std::ptrdiff_t count, std::ptrdiff_t size) {
  const std::ptrdiff_t blocks = (count + size - 1) / size;
  expects(blocks <= INT32_MAX, blocks, " CTAs are more than one launch takes");
  return static_cast<unsigned>(blocks);
}

}  // namespace specattn::inline SPECATTN_CODE::detail
