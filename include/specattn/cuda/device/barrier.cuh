// Transaction barriers in shared memory (mbarrier) and the bulk copies that complete them, Hopper and later. One function
// for an instruction: PTX ISA 9, "mbarrier" and "cp.async.bulk".
#pragma once

#include "requirements.cuh"  // first

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../../config.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// A barrier of 8 bytes, named by its shared-memory address. Its phases complete one after another.
class shared_barrier {
 public:
  __device__ explicit shared_barrier(std::uint32_t address) : address_(address) {}

  /// For one thread, before fence_barriers(): a phase completes with that many arrivals.
  __device__ void init(int arrivals) const {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address_), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() const {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address_) : "memory");
  }
  /// Arrives at the same barrier of CTA `rank` of the cluster.
  __device__ __forceinline__ void arrive_at(std::uint32_t rank) const {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(address_),
        "r"(rank)
        : "memory");
  }
  /// Arrives, and makes the phase wait for `bytes` of copies as well.
  __device__ __forceinline__ void arrive_expecting(int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address_), "r"(bytes) : "memory");
  }
  /// Copies to shared address `to` asynchronously; the bytes count towards this barrier's phase.
  __device__ __forceinline__ void copy(std::uint32_t to, const std::byte* from, int bytes) const {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(address_)
                 : "memory");
  }
  /// Copies to the same place of the cluster's first `Ctas` CTAs; the bytes count towards each one's barrier.
  template <int Ctas>
  __device__ __forceinline__ void copy_to_all(std::uint32_t to, const std::byte* from, int bytes) const {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(address_), "h"(static_cast<std::uint16_t>((1 << Ctas) - 1))
        : "memory");
  }
  /// Waits until phase `turn`, counted from 0, has completed.
  __device__ __forceinline__ void wait(std::int32_t turn) const {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::
            "r"(address_),
        "r"(turn % 2)
        : "memory");
  }

 private:
  std::uint32_t address_;
};

/// Makes this thread's init() of barriers visible to the cluster.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Makes ordinary writes to shared memory visible to bulk copies and to wgmma.
__device__ __forceinline__ void fence_shared_memory() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// A whole barrier of the cluster's CTAs, which orders all of memory.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

#endif

}  // namespace specattn::inline SPECATTN_CODE::detail
