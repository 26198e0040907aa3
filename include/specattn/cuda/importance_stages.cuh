// Blocks of signals on their way into shared memory: one bulk copy each on Hopper, a copy by all threads elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "importance_product.cuh"
#include "importance_signals.cuh"

namespace specattn::inline v0_1::detail {

inline constexpr int importance_stages = 5;
/// The stages, a word for each stage's two barriers, and what brings the first stage to a multiple of 1024 bytes.
inline constexpr int importance_shared_bytes = importance_stages * (importance_block_bytes + 16);

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Blocks are numbered in the order of their use. wait(n), the product, release(n), for n = 0, 1, …
class importance_pipeline {
 public:
  /// \param block_at  the address of block n; nullptr behind the last
  template <class BlockAt>
  __device__ importance_pipeline(std::byte* memory, BlockAt block_at) : stages_(shared_address(memory)) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < importance_stages; ++s) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(filled(s)) : "memory");
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(emptied(s)), "n"(importance_threads / 32) : "memory");
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    for (int s = 0; s < importance_stages; ++s) copy(s, block_at(s));
  }

  /// The shared address of block n, once it is there.
  __device__ __forceinline__ std::uint32_t wait(std::int32_t n) const {
    block(filled(n % importance_stages), n / importance_stages);
    return stage(n % importance_stages);
  }
  /// This warp has done with block n.
  __device__ __forceinline__ void release(std::int32_t n) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(emptied(n % importance_stages)) : "memory");
    }
  }
  /// Once every warp has done with block n, asks for the one that follows in its stage.
  template <class BlockAt>
  __device__ __forceinline__ void refill(std::int32_t n, BlockAt block_at) const {
    if (threadIdx.x != 0 || n < 0) return;
    const std::byte* from = block_at(n + importance_stages);
    if (from == nullptr) return;
    block(emptied(n % importance_stages), n / importance_stages);
    copy(n % importance_stages, from);
  }

 private:
  __device__ std::uint32_t stage(int s) const {
    return stages_ + static_cast<std::uint32_t>(s * importance_block_bytes);
  }
  __device__ std::uint32_t filled(int s) const {
    return stage(importance_stages) + static_cast<std::uint32_t>(s * 16);
  }
  __device__ std::uint32_t emptied(int s) const { return filled(s) + 8; }

  __device__ __forceinline__ void copy(int s, const std::byte* from) const {
    if (threadIdx.x != 0 || from == nullptr) return;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(filled(s)), "n"(importance_block_bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(stage(s)),
        "l"(from), "n"(importance_block_bytes), "r"(filled(s))
        : "memory");
  }
  /// Until the barrier has completed its turn-th phase.
  __device__ __forceinline__ static void block(std::uint32_t barrier, std::int32_t turn) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::
            "r"(barrier),
        "r"(turn % 2)
        : "memory");
  }

  std::uint32_t stages_;
};

#else

class importance_pipeline {
 public:
  template <class BlockAt>
  __device__ importance_pipeline(std::byte* memory, BlockAt block_at) : stages_(shared_address(memory)) {
    for (int s = 0; s + 1 < importance_stages; ++s) copy(s, block_at(s));
  }

  __device__ __forceinline__ std::uint32_t wait(std::int32_t n) const {
    asm volatile("cp.async.wait_group %0;" ::"n"(importance_stages - 2) : "memory");
    __syncthreads();
    return stage(n % importance_stages);
  }
  __device__ __forceinline__ void release(std::int32_t) const {}
  template <class BlockAt>
  __device__ __forceinline__ void refill(std::int32_t n, BlockAt block_at) const {
    const std::int32_t next =
        n + importance_stages;  // every warp is past block n: each has waited for the one behind
    copy(next % importance_stages, block_at(next));
  }

 private:
  __device__ std::uint32_t stage(int s) const {
    return stages_ + static_cast<std::uint32_t>(s * importance_block_bytes);
  }
  __device__ __forceinline__ void copy(int s, const std::byte* from) const {
    for (int i = static_cast<int>(threadIdx.x) * 16; from != nullptr && i < importance_block_bytes;
         i += importance_threads * 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(stage(s) + static_cast<std::uint32_t>(i)),
                   "l"(from + i)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  std::uint32_t stages_;
};

#endif

}  // namespace specattn::inline v0_1::detail
