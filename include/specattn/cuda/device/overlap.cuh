// Programmatic dependent launch: a kernel's CTAs are placed before the kernel before it on the stream has ended. Before
// Hopper both functions do nothing. CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
#pragma once

#include "requirements.cuh"  // first

#include "../../config.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Lets the next kernel on the stream be placed once every CTA of this grid has called this or ended. What the next one
/// reads after wait_for_previous_kernel() is complete all the same: that waits for the end of this grid.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Waits until the previous kernel on the stream has ended and its writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace specattn::inline SPECATTN_CODE::detail
