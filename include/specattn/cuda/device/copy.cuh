// Memory traffic, one function for an instruction: asynchronous copies to shared memory (cp.async), loads and stores with
// an L2 policy or an order. PTX ISA 9, "Data Movement and Conversion Instructions".
#pragma once

#include "requirements.cuh"  // first

#include <cuda_runtime.h>

#include <cstdint>

#include "../../config.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

#if defined(__NVCC__)  // not on the emulated device of the tests

/// The shared-memory address of a generic pointer, as the instructions take it.
__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// Copies `bytes` of 16 bytes to shared memory asynchronously and zeros the rest; reads nothing where bytes is 0. Both
/// addresses are multiples of 16.
__device__ __forceinline__ void copy_16_bytes(std::uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
/// The same under an L2 policy, a copy_policy().
__device__ __forceinline__ void copy_16_bytes(std::uint32_t to, const void* from, int bytes, std::uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(bytes), "l"(policy)
               : "memory");
}
void copy_16_bytes(std::uint32_t to, const void* from, bool wanted) = delete;  // `bytes` is a number: 16, not true
#endif

/// Copies 16 bytes to shared memory asynchronously; the emulated device at once.
__device__ __forceinline__ void copy_16_bytes(void* to, const void* from) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#else
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
}

/// Waits until this thread's copies have arrived, closed or not.
__device__ __forceinline__ void await_all_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#if defined(__NVCC__)

/// How long the L2 keeps what is copied: `again` says that somebody reads it once more.
__device__ __forceinline__ std::uint64_t copy_policy(bool again) {
  std::uint64_t once, normal;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
  return again ? normal : once;
}

/// Closes this thread's group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `Open` of this thread's closed groups are under way.
template <int Open>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
}
/// Stores what is read again soon: the L2 keeps it for longer than what is only read.
__device__ __forceinline__ void store_for_soon(float* to, float x) {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(to), "f"(x), "l"(policy) : "memory");
}

/// A relaxed load of device scope: a kernel that still runs may change the value at any time.
__device__ __forceinline__ std::int32_t read_now(const std::int32_t* from) {
  std::int32_t x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

#endif

}  // namespace specattn::inline SPECATTN_CODE::detail
