// How a CTA of the device's attend() finds its share of a pass from the lengths and counts as they are in memory: a fixed
// grid, no plan before the launch, and nothing on the host. Runs once per CTA with a cold instruction cache: its cost is its
// code size, so the usual path is short and the rare one out of line.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../device/overlap.cuh"
#include "../device/warp.cuh"
#include "plan.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Of some groups' blocks.
struct alignas(16) attend_totals {
  std::uint32_t blocks = 0;
  std::uint32_t cost = 0;     ///< virtual positions and what starting a block is worth
  std::uint32_t longest = 0;  ///< virtual positions of a block
  std::uint32_t most = 0;     ///< blocks of a group
};

template <int Threads>
struct attend_plan_memory {
  attend_range range;  ///< of the CTA
  device_block first;  ///< the block that it begins in, where shares cross from one block to the next
  attend_totals warps[Threads / 32];
  std::int64_t costs[Threads / 32];
  alignas(device_block) std::byte groups[Threads * sizeof(device_block)];

  /// What the blocks of a group share, where a thread has one at most.
  __device__ device_block& group(std::int32_t g) { return reinterpret_cast<device_block*>(groups)[g]; }
};

/// Where in group g, whose blocks' common part is b, the cost `x` falls.
template <storage T>
__device__ __forceinline__ attend_cut cut_in_group(const attend_launch<T>& launch, std::int32_t g,
                                                   const device_block& b, std::int64_t x) {
  std::int32_t step = 0, behind = launch.rows.steps(b.slots);
  while (behind - step > 1) {
    const std::int32_t middle = (step + behind) / 2;
    (launch.rows.cost_before(middle, b.kept, b.slots) <= x ? step : behind) = middle;
  }
  x -= launch.rows.cost_before(step, b.kept, b.slots);
  const std::int64_t cost = launch.rows.block_cost(step, b.kept, b.slots);
  attend_cut cut;
  cut.group = g;
  for (cut.block = step * launch.rows.blocks_a_slot; x >= cost; x -= cost) ++cut.block;
  cut.left = static_cast<std::uint32_t>(cost - x);
  const auto position = static_cast<std::int32_t>(x) - attend_block_cost;
  cut.position = position < 0 ? 0 : position / attend_tile * attend_tile;
  return cut;
}

/// total / shares, rounded up. Divisions of 64 bits are slow, and hardly ever needed.
__device__ __forceinline__ std::int64_t even_share(std::int64_t total, std::uint32_t shares) {
  if (total <= INT32_MAX) return (static_cast<std::uint32_t>(total) + shares - 1) / shares;
  return (total + shares - 1) / shares;
}

/// Equal shares of all blocks' costs, wherever they end; this thread's groups are [begin, end).
template <int Threads, storage T>
static __device__ __noinline__ void cut_anywhere(const attend_launch<T>& launch, std::int32_t begin, std::int32_t end,
                                                 attend_plan_memory<Threads>& memory) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const auto group_at = [&](std::int32_t g) {
    return launch.groups() <= Threads ? memory.group(g) : launch.group_at(g);
  };
  std::int64_t mine = 0;
  for (std::int32_t g = begin; g < end; ++g) mine += launch.group_cost(group_at(g));
  std::int64_t before = prefix_sum_over_warp(mine), total = 0;
  if (lane == 31) memory.costs[warp] = before;
  __syncthreads();
  before -= mine;
  for (int w = 0; w < Threads / 32; ++w) {
    if (w < warp) before += memory.costs[w];
    total += memory.costs[w];
  }
  attend_range& range = memory.range;
  const std::int64_t even = even_share(total, gridDim.x);
  const std::int64_t share = even < attend_least_share ? attend_least_share : even;
  const std::int64_t first = share * blockIdx.x, last = first + share;
  if (threadIdx.x == 0) {
    range.parts = {};
    range.share = share < UINT32_MAX ? static_cast<std::uint32_t>(share) : UINT32_MAX;
    if (first >= total) range.begin = {launch.groups(), 0, 0, 0};
    if (last >= total) range.end = {launch.groups(), 0, 0, 0};
  }
  for (std::int32_t g = begin; g < end && before <= last; ++g) {
    const device_block group = group_at(g);
    const std::int64_t behind = before + launch.group_cost(group);
    if (before <= first && first < behind) {
      range.begin = cut_in_group(launch, g, group, first - before);
      memory.first = launch.block_of(group, range.begin.block);
    }
    if (before <= last && last < behind) range.end = cut_in_group(launch, g, group, last - before);
    before = behind;
  }
  __syncthreads();
}

/// `parts` CTAs for each block, or fewer where it is short. Every group has `blocks` blocks.
template <int Threads, storage T>
__device__ __forceinline__ void cut_each_block(const attend_launch<T>& launch, std::uint32_t parts,
                                               std::uint32_t blocks, attend_plan_memory<Threads>& memory,
                                               device_block& block) {
  const std::uint32_t index = blockIdx.x / parts, mine = blockIdx.x - index * parts;
  const auto g = static_cast<std::int32_t>(blocks == 1 ? index : index / blocks);
  const auto b = static_cast<std::int32_t>(index) - g * static_cast<std::int32_t>(blocks);
  block = launch.block_of(memory.group(g < launch.groups() ? g : 0), b);
  const std::uint32_t tiles = (static_cast<std::uint32_t>(block.attended) + attend_tile - 1) / attend_tile;
  const std::uint32_t even = (tiles + parts - 1) / parts, least = attend_least_share / attend_tile;
  const std::uint32_t each = even < least ? least : even;
  const std::uint32_t count = even <= least ? (tiles + least - 1) / least : (tiles + each - 1) / each;
  if (threadIdx.x == 0) {
    const auto position = static_cast<std::int32_t>(mine * each * attend_tile);
    attend_range& range = memory.range;
    range.begin = {g, b, position, 0};
    range.end = {g, b, position + static_cast<std::int32_t>(each) * attend_tile, 0};
    range.parts = {static_cast<std::int32_t>(index * parts), static_cast<std::int32_t>(count),
                   static_cast<std::int32_t>(mine)};
    if (mine + 1 == count) range.end = {g, b + 1, 0, 0};
    if (mine >= count || g >= launch.groups()) range.end = {g - 1, 0, 0, 0};  // nothing to do
  }
  __syncthreads();
}

/// The sum over the CTA.
template <int Threads>
__device__ __forceinline__ attend_totals add_up(attend_totals sum, attend_totals (&warps)[Threads / 32]) {
  sum.blocks = __reduce_add_sync(~0u, sum.blocks);
  sum.cost = __reduce_add_sync(~0u, sum.cost);
  sum.longest = __reduce_max_sync(~0u, sum.longest);
  sum.most = __reduce_max_sync(~0u, sum.most);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warps[0];
#pragma unroll 1
  for (int w = 1; w < Threads / 32; ++w) {
    const attend_totals of = warps[w];
    if (of.blocks == 0) break;  // after the last group, or blocks are not alike
    sum.blocks += of.blocks;
    sum.cost += of.cost;
    sum.longest = sum.longest > of.longest ? sum.longest : of.longest;
    sum.most = sum.most > of.most ? sum.most : of.most;
  }
  return sum;
}

/// Cuts the work of all groups; all threads of a CTA call. A thread has the groups [begin, end): `only` is what memory
/// holds about it where groups are no more than threads. Where blocks are equal enough and few enough, each has CTAs of
/// its own, so that none begins a second one; else shares cross from one block to the next.
template <int Threads, storage T>
__device__ __forceinline__ void cut(const attend_launch<T>& launch, std::int32_t begin, std::int32_t end,
                                    const attend_group& only, attend_plan_memory<Threads>& memory,
                                    device_block& block) {
  const auto groups = static_cast<std::uint32_t>(launch.groups());
  const bool one_each = groups <= Threads;
  attend_totals mine;
  if (one_each && begin < end) {
    const device_block group = launch.group_of(begin, only);
    memory.group(begin) = group;
    mine.blocks = mine.most = static_cast<std::uint32_t>(launch.rows.blocks(group.slots));
    mine.longest = static_cast<std::uint32_t>(group.kept + group.slots);
    mine.cost = mine.blocks * (mine.longest + attend_block_cost);
  }
  const attend_totals all = add_up<Threads>(mine, memory.warps);
  if (one_each && all.blocks > 0 && all.blocks <= gridDim.x && all.most * groups == all.blocks) {
    const std::uint32_t parts = gridDim.x / all.blocks;
    const std::uint64_t longest = (all.longest + parts - 1) / parts;
    // A share may be a little longer than an even one: fewer CTAs read as fast.
    if (longest * gridDim.x <= std::uint64_t{all.cost} + all.cost / 16)
      return cut_each_block(launch, parts, all.most, memory, block);
  }
  cut_anywhere(launch, begin, end, memory);
  block = memory.first;
}

/// Finds the share of this CTA and the block that it begins in; all of its threads call. Behind an append the lengths and
/// counts were there before it, and nothing waits. Elsewhere they may be what the kernel before is writing: a share is
/// found from what they are while that still runs, and once more should any have changed when it is done.
template <int Threads, storage T>
__device__ __forceinline__ void find_range(const attend_launch<T>& launch, attend_plan_memory<Threads>& memory,
                                           device_block& block) {
  const std::int32_t groups = launch.groups(), each = groups <= Threads ? 1 : (groups + Threads - 1) / Threads;
  const std::int32_t begin = static_cast<std::int32_t>(threadIdx.x) * each;
  const std::int32_t end = begin + each < groups ? begin + each : groups;
  const bool mine = each == 1 && begin < end;
  bool sure = launch.behind_append;
  if (!sure && each > 1) {
    wait_for_previous_kernel();
    sure = true;
  }
  attend_group group;
  if (mine) group = launch.read_group(begin);
#pragma unroll 1
  while (true) {
    cut(launch, begin, end, group, memory, block);
    if (sure) return;
    wait_for_previous_kernel();
    attend_group now;
    if (mine) now = launch.read_group(begin);
    if (__syncthreads_or(now == group ? 0 : 1) == 0) return;
    group = now;
    sure = true;
  }
}

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
