// mask_union() on the device: one launch, a cluster of CTAs for each sequence and kv head (a lone CTA before Hopper).
//
// A merge would wait for memory at every entry. Here a position of a window is a word of shared memory, and a list sets its
// slot's bit of it: entries come in any order, all at once. In a round the cluster's CTAs take windows side by side, each
// its own:
// 1. words get the bits of slots that keep everything; meanwhile a warp searches a list for where the window begins or ends
// 2. all warps read the entries between, eight loads a lane under way, and set bits
// 3. a warp counts the words it holds that are not empty, and tells every CTA
// 4. after the round's one cluster barrier each warp knows where its entries go, and writes them ascending
// Rounds follow each other up to the prefix's end, or until the capacity is exceeded. CTAs differ only in their windows, so
// that all make the same rounds. Lists are read once, but for the search's three probes of 32 entries.
#pragma once

#include "device/requirements.cuh"  // first

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../mask_union.hpp"
#include "context.cuh"
#include "device/launch.cuh"
#include "device/warp.cuh"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int union_threads = 512;
inline constexpr int union_warps = union_threads / 32;
inline constexpr int union_window = 4096;  ///< positions of a CTA's window
inline constexpr int union_max_cluster = 8;
inline constexpr int union_ahead = 8;                 ///< loads a lane has under way
inline constexpr int union_chunk = 32 * union_ahead;  ///< entries a warp reads together

struct union_memory {
  std::uint32_t words[union_window];
  std::int32_t bounds[union_slots][2];  ///< of a slot's entries in the window: first, end
  std::uint32_t
      counts[2][union_max_cluster * union_warps];  ///< of this round and of the one before, which peers may read
};

/// The CTAs that make one union.
class union_team {
 public:
  __device__ union_team() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    rank_ = static_cast<int>(cluster.block_rank());
    size_ = static_cast<int>(cluster.num_blocks());
    cluster.sync();  // a peer's memory may be written once the peer runs
#endif
  }
  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }

  __device__ void sync() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
  }
  /// Where a peer keeps what this CTA keeps at `mine`.
  template <class T>
  __device__ T* at_peer(T* mine, int peer) const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(mine, peer);
#else
    return mine;
#endif
  }

 private:
  int rank_ = 0;
  int size_ = 1;
};

/// What the lists' counts and status say together; a lane reads a slot's.
struct union_facts {
  std::uint32_t all = 0;  ///< bit i: slot i keeps everything
  std::uint32_t status = selection_ok;
  bool everything = false;

  __device__ union_facts(const mask_union_args<cuda>& a, const union_source& from) {
    const auto lane = static_cast<std::int32_t>(threadIdx.x) % 32;
    const bool is_slot = lane < from.slots;
    all = __ballot_sync(~0u, is_slot && a.lists.counts[from.list(lane)] == keep_all);
    everything = from.slots > 0 && __popc(all) == from.slots;
    if (is_slot && !a.lists.status.empty()) status = a.lists.status[from.list(lane)];
    status = over_warp(status, [](std::uint32_t x, std::uint32_t y) { return x | y; });
  }
};

/// How many entries of an ascending list are below a position. For whole warps, which ask 32 places at a time.
__device__ inline std::int32_t entries_below(const slot_list& list, std::int32_t position) {
  const auto lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  std::int32_t low = 0, high = list.count;  // the answer is one of low … high
  while (low < high) {
    const std::int32_t step = (high - low - 1) / 32 + 1;
    const std::int64_t at = low + std::int64_t{lane + 1} * step - 1;
    const bool below = at < high && list.entry(static_cast<std::int32_t>(at)) < position;
    low += __popc(__ballot_sync(~0u, below)) * step;
    if (step - 1 < high - low) high = low + step - 1;
  }
  return low;
}

/// Positions [begin, end), at most union_window.
struct union_range {
  std::int32_t begin, end;

  __device__ union_range(std::int64_t first, std::int32_t kv_len)
      : begin(static_cast<std::int32_t>(first < kv_len ? first : kv_len)),
        end(kv_len - begin < union_window ? kv_len : begin + union_window) {}
  __device__ std::int32_t length() const { return end - begin; }
};

/// Makes the words of a window. The whole CTA calls, and may read them after it.
__device__ inline void mark_window(const mask_union_args<cuda>& a, const union_source& from, std::uint32_t all,
                                   union_range window, union_memory& memory) {
  const auto thread = static_cast<std::int32_t>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (std::int32_t i = thread; i < window.length(); i += union_threads) memory.words[i] = all;
  for (std::int32_t job = warp; job < from.slots * 2; job += union_warps) {
    const std::int32_t slot = job / 2, side = job % 2;
    std::int32_t bound = 0;
    if ((all >> slot & 1u) == 0)
      bound = entries_below(list_of(a, from.list(slot), from.kv_len), side == 0 ? window.begin : window.end);
    if (lane == 0) memory.bounds[slot][side] = bound;
  }
  __syncthreads();
  for (std::int32_t job = warp; job < from.slots * (union_window / union_chunk); job += union_warps) {
    const std::int32_t slot = job % from.slots;
    const std::int32_t first = memory.bounds[slot][0] + job / from.slots * union_chunk + lane;
    const std::int32_t end = memory.bounds[slot][1];
    const auto list = a.lists.positions[from.list(slot)];
    std::uint32_t at[union_ahead];
#pragma unroll
    for (int i = 0; i < union_ahead; ++i) {
      const std::int32_t entry = first + i * 32;
      at[i] = entry < end ? static_cast<std::uint32_t>(list[entry]) - static_cast<std::uint32_t>(window.begin) : ~0u;
    }
#pragma unroll
    for (int i = 0; i < union_ahead; ++i) {
      if (at[i] < static_cast<std::uint32_t>(window.length())) atomicOr(&memory.words[at[i]], 1u << slot);
    }
  }
  __syncthreads();
}

/// Writes the entries of the cluster's windows behind the `size` that there are, as far as they go; returns their number
/// with them. `counts` is the round's.
__device__ inline std::int32_t list_windows(const mask_union_args<cuda>& a, std::ptrdiff_t group,
                                            const union_team& team, union_range window, const union_memory& memory,
                                            std::uint32_t* counts, std::int32_t size) {
  constexpr int each = union_window / union_threads;
  const auto warp = static_cast<std::int32_t>(threadIdx.x) / 32, lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  const std::int32_t own = team.rank() * union_warps + warp, first = warp * each * 32 + lane;
  std::uint32_t word[each], held[each], count = 0;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    word[i] = first + i * 32 < window.length() ? memory.words[first + i * 32] : 0;
    held[i] = __ballot_sync(~0u, word[i] != 0);
    count += static_cast<std::uint32_t>(__popc(held[i]));
  }
  if (lane < team.size()) *team.at_peer(counts + own, lane) = count;
  team.sync();
  std::uint32_t before = 0, total = 0;
  for (std::int32_t i = lane; i < team.size() * union_warps; i += 32) {
    total += counts[i];
    if (i < own) before += counts[i];
  }
  std::ptrdiff_t to = std::ptrdiff_t{size} + sum_over_warp(before);
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const std::ptrdiff_t place = to + __popc(held[i] & ((1u << lane) - 1));
    if (word[i] != 0 && place < a.out.capacity()) {
      a.out.positions(group, place) = window.begin + first + i * 32;
      a.slot_masks(group, place) = word[i];
    }
    to += __popc(held[i]);
  }
  return size + static_cast<std::int32_t>(sum_over_warp(total));
}

static __global__ void __launch_bounds__(union_threads)
    mask_union_kernel(const __grid_constant__ mask_union_args<cuda> a) {
  __shared__ union_memory memory;
  const union_team team;
  const std::ptrdiff_t group = static_cast<std::ptrdiff_t>(blockIdx.x) / team.size();
  const union_source from = source_of(a, group);
  const union_facts facts(a, from);
  const std::int32_t end = facts.everything ? 0 : from.kv_len;
  std::int32_t size = 0;
  int parity = 0;
  for (std::int64_t base = 0; base < end && size <= a.out.capacity(); base += union_window * team.size()) {
    const union_range window(base + union_window * team.rank(), end);
    if (window.length() > 0) mark_window(a, from, facts.all, window, memory);
    size = list_windows(a, group, team, window, memory, memory.counts[parity], size);
    parity ^= 1;
  }
  if (team.rank() == 0)
    finish_union(a, group, facts.everything, size, facts.status, static_cast<std::int32_t>(threadIdx.x),
                 union_threads);
}

template <>
struct mask_union_impl<cuda> {
  static void run(context<cuda>& ctx, const mask_union_args<cuda>& args) {
    const std::ptrdiff_t groups = args.out.groups();
    const int cluster = cluster_for(ctx, groups);
    expects(groups <= INT32_MAX / cluster, "mask_union: ", groups, " unions are more than one launch takes");
    queue_kernel(
        ctx, mask_union_kernel,
        {.grid = dim3(static_cast<unsigned>(groups * cluster)), .threads = union_threads, .cluster = cluster},
        "mask_union", args);
  }

 private:
  /// Large clusters, as long as the device runs all of them at once.
  static int cluster_for(const context<cuda>& ctx, std::ptrdiff_t groups) {
    constexpr std::ptrdiff_t at_once = 2;  // CTAs of a multiprocessor, by their registers
    int cluster = 1;
    while (ctx.code_major() >= 9 && cluster < union_max_cluster &&
           groups * cluster * 2 <= at_once * ctx.multiprocessors())
      cluster *= 2;
    return cluster;
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
