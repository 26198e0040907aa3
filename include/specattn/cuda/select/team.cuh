// The CTAs that make one group's list: one cluster (a lone CTA before Hopper), its reductions and its histogram.
#pragma once

#include "../device/requirements.cuh"  // first

#include <cooperative_groups.h>

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "../../config.hpp"
#include "../../select_math.hpp"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SPECATTN_CLUSTERS 1
#else
#define SPECATTN_CLUSTERS 0
#endif

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int select_threads = 256;
inline constexpr int select_warps = select_threads / 32;
inline constexpr int select_max_cluster = 8;  // the largest that every Hopper can place
inline constexpr int select_bins = 2048;

struct plus {
  __device__ std::uint64_t operator()(std::uint64_t a, std::uint64_t b) const { return a + b; }
};
struct greater {
  __device__ std::uint64_t operator()(std::uint64_t a, std::uint64_t b) const { return a > b ? a : b; }
};
using select_scan = cub::BlockScan<std::uint64_t, select_threads, cub::BLOCK_SCAN_WARP_SCANS>;
using select_word_scan = cub::BlockScan<std::uint32_t, select_threads, cub::BLOCK_SCAN_WARP_SCANS>;

/// Pins a shared-memory address in a register. In cluster kernels the compiler otherwise recomputes it at every use (four
/// instructions, thirty cycles), and hoists what depends on it out of loops that mostly have one turn, which spills.
template <class T>
__device__ __forceinline__ T* settled(T* place) {
#if defined(__CUDA_ARCH__)
  auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(place));
  asm volatile("" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
#else
  return place;
#endif
}

/// The shared memory of one CTA.
struct select_team_memory {
  std::uint64_t sums[select_bins];    ///< this CTA's histogram: a 64-bit sum a bin, or two arrays of 32-bit sums
  std::uint64_t merged[select_bins];  ///< the cluster's
  std::uint64_t slots[2][2][select_max_cluster * select_warps];
  std::uint32_t prefixes[select_threads];
  std::uint32_t bin;
  std::uint64_t above, here;  ///< mass in heavier bins, and in this one
  select_scan::TempStorage scan;
  select_word_scan::TempStorage word_scan;
};

/// All members of the cluster call the same operations in the same order.
class select_team {
 public:
  __device__ explicit select_team(select_team_memory& memory) : memory_(memory) {
#if SPECATTN_CLUSTERS
    const auto cluster = cooperative_groups::this_cluster();
    rank_ = static_cast<int>(cluster.block_rank());
    size_ = static_cast<int>(cluster.num_blocks());
    if (size_ > 1) arrive();
#endif
  }

  /// To be called before the first exchange: a peer's memory may be written once the peer runs.
  __device__ void meet() {
#if SPECATTN_CLUSTERS
    if (size_ > 1 && !met_) cooperative_groups::this_cluster().barrier_wait();
#endif
    met_ = true;
  }

  /// A barrier after which peers may read what this CTA has written to its own shared memory, and that alone: a tenth of
  /// what sync() costs, which orders all of memory.
  __device__ __forceinline__ void sync_own() const {
#if SPECATTN_CLUSTERS
    if (size_ > 1) {
#if defined(__CUDA_ARCH__)
      asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
#endif
      arrive();
      cooperative_groups::this_cluster().barrier_wait();
      return;
    }
#endif
    __syncthreads();
  }

  /// The two halves of a barrier after which a CTA may end: peers have read what they wanted of it.
  __device__ __forceinline__ void part() const {
#if SPECATTN_CLUSTERS
    if (size_ > 1) arrive();
#endif
  }
  __device__ __forceinline__ void await_peers() const {
#if SPECATTN_CLUSTERS
    if (size_ > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
  }

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }  ///< a power of two
  __device__ int log_size() const { return 31 - __clz(size_); }
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ select_team_memory& memory() { return memory_; }

  __device__ void sync() const {
#if SPECATTN_CLUSTERS
    if (size_ > 1) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
  }

  /// Replaces each x[n] by op over every thread of the cluster. op's neutral element is 0.
  template <int N, class Op>
  __device__ void reduce(std::uint64_t (&x)[N], Op op) {
    share(x, op);
    sync();
    gather(x, op);
  }

  /// Makes `key` the largest of all threads'; returns whether `flag` is set in any.
  __device__ bool largest_and_any(std::uint32_t& key, bool flag) {
    const std::uint64_t flags = __any_sync(~0u, flag) != 0 ? 1 : 0;
    publish(0, flags << 32 | __reduce_max_sync(~0u, key));
    sync();
    std::uint32_t most = 0;
    bool any = false;
    for (int i = lane(); i < size_ * select_warps; i += 32) {
      const std::uint64_t slot = memory_.slots[parity_][0][i];
      const auto theirs = static_cast<std::uint32_t>(slot);
      most = theirs > most ? theirs : most;
      any = any || slot >> 32 != 0;
    }
    key = __reduce_max_sync(~0u, most);
    parity_ ^= 1;
    return __any_sync(~0u, any) != 0;
  }

  /// The sum over the calling warp.
  __device__ static std::uint64_t warp_sum(std::uint64_t x) {
    return __any_sync(~0u, x != 0) ? over_warp(x, plus{}) : 0;
  }

  /// `before`: what the CTAs of lower rank have of x; `total`: what all have.
  __device__ void sum_before(std::uint64_t x, std::uint64_t& before, std::uint64_t& total) {
    std::uint64_t mine[1] = {x};
    share(mine, plus{});
    sync();
    before = total = 0;
    for (int i = lane(); i < size_ * select_warps; i += 32) {
      const std::uint64_t each = memory_.slots[parity_][0][i];
      total += each;
      if (i < rank_ * select_warps) before += each;
    }
    before = over_warp(before, plus{});
    total = over_warp(total, plus{});
    parity_ ^= 1;
  }

  /// Empties the first `count` words of the histogram.
  template <class Word>
  __device__ void clear(int arrays, int count) {
    __syncthreads();
    Word* words = reinterpret_cast<Word*>(memory_.sums);
    for (int a = 0; a < arrays; ++a) {
      for (int i = thread(); i < count; i += select_threads) words[a * select_bins + i] = 0;
    }
    __syncthreads();
  }

  /// Makes merged() of the members' histograms, each member a slice, and sums x over all threads. `arrays` sums lie
  /// side by side for each bin; mass_of(bin, sums over the members) is the bin's mass.
  template <class Word, int Arrays, class MassOf>
  __device__ void merge(int count, MassOf mass_of, std::uint64_t (&x)[1]) {
    share(x, plus{});
    sync();
    const int slice = (count + size_ - 1) / size_;
    const int end = (rank_ + 1) * slice < count ? (rank_ + 1) * slice : count;
    for (int bin = rank_ * slice + thread(); bin < end; bin += select_threads) {
      Word parts[Arrays][select_max_cluster];
      std::uint64_t sums[Arrays] = {};
#pragma unroll
      for (int peer = 0; peer < select_max_cluster; ++peer) {
#pragma unroll
        for (int a = 0; a < Arrays; ++a)
          parts[a][peer] =
              peer < size_ ? at_peer(reinterpret_cast<Word*>(memory_.sums), peer)[a * select_bins + bin] : 0;
      }
#pragma unroll
      for (int peer = 0; peer < select_max_cluster; ++peer) {
#pragma unroll
        for (int a = 0; a < Arrays; ++a) sums[a] += parts[a][peer];
      }
      const std::uint64_t mass = mass_of(bin, sums);
#pragma unroll
      for (int peer = 0; peer < select_max_cluster; ++peer) {
        if (peer < size_) at_peer(memory_.merged, peer)[bin] = mass;
      }
    }
    sync();
    gather(x, plus{});
  }
  /// Masses of the bins; valid from merge() to the next clear().
  __device__ const std::uint64_t* merged() const { return memory_.merged; }

  /// visit(peer) for every member. Most clusters are small, so that eight predicated visits would be a waste.
  template <class Visit>
  __device__ __forceinline__ void each_peer(Visit visit) const {
    if (size_ <= 2) {
      visit(0);
      if (size_ > 1) visit(1);
      return;
    }
#pragma unroll
    for (int peer = 0; peer < select_max_cluster; ++peer) {
      if (peer < size_) visit(peer);
    }
  }

  /// Where a peer keeps what this CTA keeps at `mine`.
  template <class T>
  __device__ T* at_peer(T* mine, int peer) const {
#if SPECATTN_CLUSTERS
    if (size_ > 1) return cooperative_groups::this_cluster().map_shared_rank(mine, peer);
#endif
    return mine;
  }

 private:
#if SPECATTN_CLUSTERS
  /// Orders nothing: barrier_arrive() would first wait for all of memory.
  __device__ __forceinline__ static void arrive() {
#if defined(__CUDA_ARCH__)
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
    cooperative_groups::this_cluster().barrier_arrive();
#endif
  }
#endif

  template <class Op>
  __device__ static std::uint64_t over_warp(std::uint64_t x, Op op) {
    for (int distance = 16; distance > 0; distance /= 2) x = op(x, __shfl_xor_sync(~0u, x, distance));
    return x;
  }

  /// Gives every member this warp's value. Two sets of slots: one may still be read while the other is written.
  __device__ void publish(int n, std::uint64_t x) {
    std::uint64_t* mine = &memory_.slots[parity_][n][rank_ * select_warps + warp()];
    if (lane() < size_) *at_peer(mine, lane()) = x;
  }
  template <int N, class Op>
  __device__ void share(std::uint64_t (&x)[N], Op op) {
    for (int n = 0; n < N; ++n) {
      if (__any_sync(~0u, x[n] != 0)) x[n] = over_warp(x[n], op);
      publish(n, x[n]);
    }
  }

  /// After share() and a synchronisation: x over all.
  template <int N, class Op>
  __device__ void gather(std::uint64_t (&x)[N], Op op) {
    for (int n = 0; n < N; ++n) {
      std::uint64_t sum = 0;
      for (int i = lane(); i < size_ * select_warps; i += 32) sum = op(sum, memory_.slots[parity_][n][i]);
      x[n] = over_warp(sum, op);
    }
    parity_ ^= 1;
  }

  select_team_memory& memory_;
  int rank_ = 0;
  int size_ = 1;
  int parity_ = 0;
  bool met_ = false;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"

#undef SPECATTN_CLUSTERS
