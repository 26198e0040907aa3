// The CTAs that work on one row of logits: one cluster (a lone CTA before Hopper) and its reductions.
#pragma once

#include "../device/requirements.cuh"  // first

#include <cooperative_groups.h>

#include <cstdint>

#include "../../config.hpp"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SPECATTN_CLUSTERS 1
#else
#define SPECATTN_CLUSTERS 0
#endif

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int sampling_threads = 512;
inline constexpr int sampling_warps = sampling_threads / 32;
inline constexpr int sampling_max_cluster = 8;  // the largest that every Hopper can place
inline constexpr int sampling_bins = sampling_threads;
inline constexpr int sampling_sums = 2;  // values reduced at a time, at most

/// The shared memory of one CTA.
struct sampling_team_memory {
  std::uint64_t warps[2][sampling_sums][sampling_warps];          ///< this CTA's
  std::uint64_t members[2][sampling_sums][sampling_max_cluster];  ///< the cluster's
  std::uint32_t low[sampling_bins], high[sampling_bins];          ///< this CTA's histogram, two words a bin
  std::uint64_t merged[sampling_bins];                            ///< the cluster's
  std::uint64_t scanned[sampling_warps];
  std::uint64_t ahead;
  std::int32_t bin;
  std::int32_t token;
};

/// All members of the cluster call the same operations in the same order.
class sampling_team {
 public:
  __device__ explicit sampling_team(sampling_team_memory& memory) : memory_(memory) {
#if SPECATTN_CLUSTERS
    const auto cluster = cooperative_groups::this_cluster();
    rank_ = static_cast<int>(cluster.block_rank());
    size_ = static_cast<int>(cluster.num_blocks());
    if (size_ > 1) cluster.barrier_arrive();
#endif
  }

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }

  /// Waits until the other members run: before that their memory must not be written. Once, before anything below.
  __device__ void meet() {
#if SPECATTN_CLUSTERS
    if (size_ > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
  }

  __device__ void sync() {
#if SPECATTN_CLUSTERS
    if (size_ > 1) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
  }

  /// The largest x of all threads.
  __device__ std::uint64_t largest(std::uint64_t x) {
    std::uint64_t values[1] = {x};
    reduce(values, [](std::uint64_t a, std::uint64_t b) { return a > b ? a : b; });
    return values[0];
  }
  /// Replaces each x[n] by its sum over all threads.
  template <int N>
  __device__ void sum(std::uint64_t (&x)[N]) {
    reduce(x, [](std::uint64_t a, std::uint64_t b) { return a + b; });
  }
  /// The sum of x over all threads; `mine`: over this warp; `before`: over the warps before it, those of members of lower
  /// rank first.
  __device__ std::uint64_t sum(std::uint64_t x, std::uint64_t& mine, std::uint64_t& before) {
    std::uint64_t values[1] = {x};
    sum(values);
    const int last = parity_ ^ 1;
    mine = memory_.warps[last][0][warp()];
    before = 0;
    for (int r = 0; r < rank_; ++r) before += memory_.members[last][0][r];
    for (int w = 0; w < warp(); ++w) before += memory_.warps[last][0][w];
    return values[0];
  }

  /// Empties the histogram.
  __device__ void clear() {
    memory_.low[thread()] = memory_.high[thread()] = 0;
    __syncthreads();
  }
  __device__ void add(std::uint32_t bin, std::uint64_t amount) {
    const auto low = static_cast<std::uint32_t>(amount);
    const std::uint32_t before = atomicAdd(&memory_.low[bin], low);
    const auto high = static_cast<std::uint32_t>(amount >> 32) + (before + low < before ? 1u : 0u);
    if (high != 0) atomicAdd(&memory_.high[bin], high);
  }
  /// Makes merged() of the members' histograms, each member a slice.
  __device__ void merge() {
    sync();
    const int slice = sampling_bins / size_;
    if (thread() < slice) {
      const int bin = rank_ * slice + thread();
      std::uint64_t sum = 0;
      for (int peer = 0; peer < size_; ++peer)
        sum += (static_cast<std::uint64_t>(at_peer(memory_.high, peer)[bin]) << 32) + at_peer(memory_.low, peer)[bin];
      for (int peer = 0; peer < size_; ++peer) at_peer(memory_.merged, peer)[bin] = sum;
    }
    sync();
  }
  __device__ std::uint64_t merged(std::int32_t bin) const { return memory_.merged[bin]; }

  /// The highest bin at which `ahead` plus the bins from the top on reach `goal`, or -1; what is above it is added to
  /// `ahead`. After merge().
  __device__ std::int32_t bin_that_reaches(std::uint64_t goal, std::uint64_t& ahead) {
    const std::int32_t bin = sampling_bins - 1 - thread();
    const std::uint64_t mine = memory_.merged[bin];
    std::uint64_t upto = mine;
    for (int distance = 1; distance < 32; distance *= 2) {
      const std::uint64_t other = __shfl_up_sync(~0u, upto, static_cast<unsigned>(distance));
      if (lane() >= distance) upto += other;
    }
    if (lane() == 31) memory_.scanned[warp()] = upto;
    if (thread() == 0) memory_.bin = -1;
    __syncthreads();
    upto += ahead;
    for (int w = 0; w < warp(); ++w) upto += memory_.scanned[w];
    if (upto >= goal && upto - mine < goal) {
      memory_.bin = bin;
      memory_.ahead = upto - mine;
    }
    __syncthreads();
    if (memory_.bin >= 0) ahead = memory_.ahead;
    return memory_.bin;
  }

  /// Gives every member the token that one lane has found; the others pass a negative one.
  __device__ std::int32_t tell(std::int32_t token) {
    if (token >= 0) {
      for (int peer = 0; peer < size_; ++peer) at_peer(&memory_, peer)->token = token;
    }
    sync();
    return memory_.token;
  }

 private:
  /// Where a peer keeps what this CTA keeps at `mine`.
  template <class T>
  __device__ T* at_peer(T* mine, [[maybe_unused]] int peer) const {
#if SPECATTN_CLUSTERS
    return cooperative_groups::this_cluster().map_shared_rank(mine, peer);
#else
    return mine;
#endif
  }

  /// op's neutral element is 0. Two sets of slots: one may still be read while the other is written.
  template <int N, class Op>
  __device__ void reduce(std::uint64_t (&x)[N], Op op) {
    static_assert(N <= sampling_sums);
    for (int n = 0; n < N; ++n) {
      for (int distance = 16; distance > 0; distance /= 2) x[n] = op(x[n], __shfl_xor_sync(~0u, x[n], distance));
      if (lane() == 0) memory_.warps[parity_][n][warp()] = x[n];
    }
    __syncthreads();
    if (warp() < N) {
      std::uint64_t all = memory_.warps[parity_][warp()][lane() % sampling_warps];
      for (int distance = sampling_warps / 2; distance > 0; distance /= 2)
        all = op(all, __shfl_xor_sync(~0u, all, distance));
      if (lane() < size_) *at_peer(&memory_.members[parity_][warp()][rank_], lane()) = all;
    }
    sync();
    for (int n = 0; n < N; ++n) {
      x[n] = 0;
      for (int r = 0; r < size_; ++r) x[n] = op(x[n], memory_.members[parity_][n][r]);
    }
    parity_ ^= 1;
  }

  sampling_team_memory& memory_;
  int rank_ = 0;
  int size_ = 1;
  int parity_ = 0;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#undef SPECATTN_CLUSTERS
