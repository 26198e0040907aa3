// What the product needs next, on its way into shared memory: two bulk copies a stage on Hopper, a copy by all threads
// elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "importance_product.cuh"
#include "importance_signals.cuh"
#include "mma.cuh"

namespace specattn::inline v0_1::detail {

inline constexpr int importance_stages = 4;  // before Hopper 2: what every such device has room for
inline constexpr int importance_stages_before_hopper = 2;
/// The stages, and two barriers for each.
constexpr int importance_shared_bytes(int stages) { return stages * (importance_stage_bytes + 16); }

/// The two blocks of a stage; nullptr: there is no such stage.
struct stage_source {
  const std::byte* coefficients = nullptr;
  const std::byte* signals = nullptr;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Stages are numbered in the order of their use: for n = 0, 1, … wait(n), the product, release(n), refill(n).
class importance_pipeline {
 public:
  /// \param source_of  stage_source of stage n
  template <class SourceOf>
  __device__ importance_pipeline(std::byte* memory, SourceOf source_of) : stages_(shared_address(memory)) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < importance_stages; ++s) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(filled(s)) : "memory");
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(emptied(s)), "n"(importance_threads / 32) : "memory");
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    for (int s = 0; s < importance_stages; ++s) copy(s, source_of(s));
  }

  /// The shared address of stage n, once it is there.
  __device__ __forceinline__ std::uint32_t wait(std::int32_t n) const {
    block(filled(n % importance_stages), n / importance_stages);
    return stage(n % importance_stages);
  }
  /// This warp has done with stage n.
  __device__ __forceinline__ void release(std::int32_t n) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(emptied(n % importance_stages)) : "memory");
    }
  }
  /// Once every warp has done with stage n, asks for the one that takes its place.
  template <class SourceOf>
  __device__ __forceinline__ void refill(std::int32_t n, SourceOf source_of) const {
    if (threadIdx.x != 0) return;
    const stage_source from = source_of(n + importance_stages);
    if (from.signals == nullptr) return;
    block(emptied(n % importance_stages), n / importance_stages);
    copy(n % importance_stages, from);
  }

 private:
  __device__ std::uint32_t stage(int s) const {
    return stages_ + static_cast<std::uint32_t>(s * importance_stage_bytes);
  }
  __device__ std::uint32_t filled(int s) const {
    return stage(importance_stages) + static_cast<std::uint32_t>(s * 16);
  }
  __device__ std::uint32_t emptied(int s) const { return filled(s) + 8; }

  __device__ __forceinline__ void copy(int s, const stage_source& from) const {
    if (threadIdx.x != 0 || from.signals == nullptr) return;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(filled(s)), "n"(importance_stage_bytes)
                 : "memory");
    bulk_copy(stage(s), from.coefficients, coefficient_block_bytes, filled(s));
    bulk_copy(stage(s) + coefficient_block_bytes, from.signals, signal_block_bytes, filled(s));
  }
  __device__ __forceinline__ static void bulk_copy(std::uint32_t to, const std::byte* from, int bytes,
                                                   std::uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
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
  template <class SourceOf>
  __device__ importance_pipeline(std::byte* memory, SourceOf source_of) : stages_(shared_address(memory)) {
    for (int s = 0; s < stages; ++s) copy(s, source_of(s));
  }
  __device__ __forceinline__ std::uint32_t wait(std::int32_t n) const {
    await_copies<stages - 1>();
    __syncthreads();
    return stage(n % stages);
  }
  __device__ __forceinline__ void release(std::int32_t) const { __syncthreads(); }
  template <class SourceOf>
  __device__ __forceinline__ void refill(std::int32_t n, SourceOf source_of) const {
    copy(n % stages, source_of(n + stages));
  }

 private:
  static constexpr int stages = importance_stages_before_hopper;

  __device__ std::uint32_t stage(int s) const {
    return stages_ + static_cast<std::uint32_t>(s * importance_stage_bytes);
  }
  __device__ __forceinline__ void copy(int s, const stage_source& from) const {
    for (int i = static_cast<int>(threadIdx.x) * 16; i < importance_stage_bytes; i += importance_threads * 16) {
      const std::byte* part =
          i < coefficient_block_bytes ? from.coefficients + i : from.signals + i - coefficient_block_bytes;
      if (from.signals != nullptr) copy_16_bytes(stage(s) + static_cast<std::uint32_t>(i), part, true);
    }
    commit_copies();
  }

  std::uint32_t stages_;
};

#endif

}  // namespace specattn::inline v0_1::detail
