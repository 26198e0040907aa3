// Brings the product's next operands into shared memory. On Hopper producer threads do so, and each CTA of a cluster fetches
// half of the coefficients for both; elsewhere all threads copy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../config.hpp"
#include "../device/barrier.cuh"
#include "../device/copy.cuh"
#include "product.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Stages in shared memory, numbered in the order of their use, and two barriers for each. `Writers` arrivals fill one;
/// every CTA of a cluster uses as many. No CTA may end before all others have: sync_cluster().
template <int Stages, int Writers>
class stage_ring {
 public:
  __device__ explicit stage_ring(std::byte* memory) : stages_(shared_address(memory)) {
    if (threadIdx.x == 0) {
      for (int n = 0; n < Stages; ++n) {
        filled(n).init(Writers);
        emptied(n).init(importance_cluster * importance_threads / 32);
      }
      fence_barriers();
      fence_shared_memory();
    }
    sync_cluster();
  }
  __device__ std::uint32_t stage(std::int32_t n) const {
    return stages_ + static_cast<std::uint32_t>(n % Stages * importance_stage_bytes);
  }
  __device__ shared_barrier filled(std::int32_t n) const {
    return shared_barrier(stages_ + static_cast<std::uint32_t>(Stages * importance_stage_bytes + n % Stages * 16));
  }
  __device__ shared_barrier emptied(std::int32_t n) const {
    return shared_barrier(stages_ +
                          static_cast<std::uint32_t>(Stages * importance_stage_bytes + n % Stages * 16 + 8));
  }
  /// The shared address of stage n, once it is there.
  __device__ __forceinline__ std::uint32_t wait(std::int32_t n) const {
    filled(n).wait(n / Stages);
    return stage(n);
  }
  /// This warp has done with stage n.
  __device__ __forceinline__ void release(std::int32_t n) const {
    __syncwarp();
    if (threadIdx.x % 32 < importance_cluster) emptied(n).arrive_at(threadIdx.x % 32);
  }
  /// Until every warp of the cluster has done with what stage n takes the place of.
  __device__ __forceinline__ void await_room(std::int32_t n) const {
    if (n >= Stages) emptied(n).wait(n / Stages - 1);
  }
  /// Asks for this CTA's part of the coefficients of stage n, which has room, and has it wait for all of them and for
  /// `more` bytes. For one thread.
  __device__ __forceinline__ void fetch_coefficients(std::int32_t n, const std::byte* block, int more) const {
    constexpr int part = coefficient_block_bytes / importance_cluster;
    const int at = static_cast<int>(blockIdx.x) % importance_cluster * part;
    filled(n).arrive_expecting(coefficient_block_bytes + more);
    filled(n).copy_to_all<importance_cluster>(stage(n) + static_cast<std::uint32_t>(at), block + at, part);
  }

 private:
  std::uint32_t stages_;
};

#else

/// The two blocks of a stage; nullptr: there is no such stage.
struct stage_source {
  const std::byte* coefficients = nullptr;
  const std::byte* signals = nullptr;
};

/// Stages that all threads fill: for n = 0, 1, … wait(n), the product, release(n), refill(n).
class importance_pipeline {
 public:
  template <class NextSource>
  __device__ importance_pipeline(std::byte* memory, NextSource& next_source) : stages_(shared_address(memory)) {
    for (int s = 0; s < stages; ++s) copy(s, next_source());
  }
  __device__ __forceinline__ std::uint32_t wait(std::int32_t n) const {
    await_copies<stages - 1>();
    __syncthreads();
    return stage(n % stages);
  }
  __device__ __forceinline__ void release(std::int32_t) const { __syncthreads(); }
  template <class NextSource>
  __device__ __forceinline__ void refill(std::int32_t n, NextSource& next_source) const {
    copy(n % stages, next_source());
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
      if (from.signals != nullptr) copy_16_bytes(stage(s) + static_cast<std::uint32_t>(i), part, 16);
    }
    commit_copies();
  }

  std::uint32_t stages_;
};

#endif

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
