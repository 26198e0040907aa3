// How the device's attend() divides a pass: query rows into blocks, the positions of all blocks into one equal share
// for each CTA. Every CTA finds its own share from the lengths and counts as they are in memory; a fixed grid, no
// plan before the launch, and nothing on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "../attend.hpp"
#include "../attention_state.hpp"
#include "context.cuh"

namespace specattn::inline v0_1::detail {

inline constexpr int attend_rows = 32;          ///< query rows (slots * group) of a block at most
inline constexpr int attend_tile = 16;          ///< positions; shares end at whole tiles of a block
inline constexpr int attend_least_share = 128;  ///< positions: a tile for each warp
inline constexpr int attend_block_cost = 64;    ///< positions that starting a block is worth

/// Query rows of one sequence and kv head that are worked on together: slot and head of the group, slots slowest.
/// They attend to one virtual list: the kept prefix (all of it, or a list), then the tail.
struct device_block {
  std::int32_t sequence = 0;
  std::int32_t kv_head = 0;
  std::int32_t sequence_slot = 0;  ///< row of q where the sequence's slots begin
  std::int32_t slots = 0;          ///< of the sequence
  std::int32_t kv_len = 0;
  std::int32_t kept = 0;
  std::int32_t first_row = 0;
  std::int32_t rows = 0;
  std::int32_t attended = 0;  ///< virtual positions of the last row
};
/// A block that ends in another CTA's share than it starts in, and how many shares it has parts in.
struct divided_block {
  device_block block;
  std::int32_t parts = 0;  ///< 0: there is none
};

/// Blocks hold whole slots, or a slot that has more rows than a block is several.
struct row_division {
  std::int32_t group = 1;
  std::int32_t slots_a_block = 1;
  std::int32_t blocks_a_slot = 1;

  row_division(std::int32_t group_rows, std::int32_t block_rows)
      : group(group_rows),
        slots_a_block(group_rows < block_rows ? block_rows / group_rows : 1),
        blocks_a_slot((group_rows + block_rows - 1) / block_rows) {}

  /// Blocks that share their slots come together: a step.
  SPECATTN_HD std::int32_t steps(std::int32_t slots) const { return (slots + slots_a_block - 1) / slots_a_block; }
  SPECATTN_HD std::int32_t blocks(std::int32_t slots) const { return steps(slots) * blocks_a_slot; }
  /// Virtual positions of the last row of a step's blocks, and what starting a block is worth.
  SPECATTN_HD std::int64_t block_cost(std::int32_t step, std::int32_t kept, std::int32_t slots) const {
    const std::int64_t last = std::int64_t{step + 1} * slots_a_block;
    return kept + (last < slots ? last : slots) + attend_block_cost;
  }
  /// The sum of block_cost over the blocks before a step.
  SPECATTN_HD std::int64_t cost_before(std::int32_t step, std::int32_t kept, std::int32_t slots) const {
    if (step == 0) return 0;
    const std::int64_t n = step - 1;  // every step but the last of a sequence ends at a multiple of slots_a_block
    return blocks_a_slot *
           (n * (kept + attend_block_cost) + slots_a_block * (n * (n + 1) / 2) + block_cost(step - 1, kept, slots));
  }
};

/// What CTAs leave for the merge: two parts a share at most, one of a block that came from the share before and one
/// of a block that goes on in the next.
struct attend_exchange {
  float* sums = nullptr;              ///< [2 * shares, attend_rows, head_dim]
  attention_state* states = nullptr;  ///< [2 * shares, attend_rows]
  divided_block* divided = nullptr;   ///< [shares] the block that goes on
  std::size_t lay_out(std::byte* base, std::size_t shares, std::size_t head_dim) {
    std::size_t bytes = 0;
    const auto take = [&](auto*& array, std::size_t count) {
      using element = std::remove_reference_t<decltype(*array)>;
      if (base != nullptr) array = reinterpret_cast<element*>(base + bytes);
      bytes += (count * sizeof(element) + 255) / 256 * 256;
    };
    take(sums, 2 * shares * attend_rows * head_dim);
    take(states, 2 * shares * attend_rows);
    take(divided, shares);
    return bytes;
  }
};

/// What a launch is asked for; passed by value.
template <storage T>
struct attend_launch {
  attend_args<T, cuda> args;
  float scale = 1.0f;
  row_division rows;
  attend_exchange exchange;
  std::int32_t stages = 2;  ///< tiles of positions that a warp has under way or at hand

  __device__ bool records() const { return !args.recording.weights.empty(); }
  __device__ std::int32_t groups() const {
    return static_cast<std::int32_t>(args.kv_lens.extent(0)) * args.kv.kv_heads;
  }
  __device__ int slot_of(const device_block& b, int row) const { return (b.first_row + row) / rows.group; }
  __device__ int head_of(const device_block& b, int row) const {
    return b.kv_head * rows.group + (b.first_row + row) % rows.group;
  }
  __device__ bool recorded(const device_block& b, int row) const {
    return args.recording.slots == record_slots::all || slot_of(b, row) == b.slots - 1;
  }
  /// Where a recorded row's entries lie, relative to the recording.
  __device__ std::ptrdiff_t recording_of(const device_block& b, int row) const {
    const std::ptrdiff_t at =
        args.recording.slots == record_slots::newest ? b.sequence : b.sequence_slot + slot_of(b, row);
    return at * args.recording.weights.stride(0) + head_of(b, row) * args.recording.weights.stride(1);
  }

  /// What the blocks of a group (sequence, kv head) share. Counts outside a list's row are cut to it.
  __device__ device_block group_at(std::int32_t g) const {
    device_block b;
    b.sequence = g / args.kv.kv_heads;
    b.kv_head = g % args.kv.kv_heads;
    b.sequence_slot = args.slot_offsets[b.sequence];
    b.slots = args.slot_offsets[b.sequence + 1] - b.sequence_slot;
    b.kv_len = b.kept = args.kv_lens[b.sequence];
    if (args.kept.counts.empty()) return b;
    const std::int32_t count = args.kept.counts[b.sequence * args.kept_sequence_stride + b.kv_head];
    if (count == keep_all) return b;
    const auto most = static_cast<std::int32_t>(args.kept.capacity() < b.kv_len ? args.kept.capacity() : b.kv_len);
    b.kept = count < 0 ? 0 : count < most ? count : most;
    return b;
  }
  __device__ std::int64_t group_cost(std::int32_t g) const {
    const device_block b = group_at(g);
    return rows.cost_before(rows.steps(b.slots), b.kept, b.slots);
  }
  /// Block `index` of a group.
  __device__ device_block block_at(std::int32_t g, std::int32_t index) const {
    device_block b = group_at(g);
    const std::int32_t step = index / rows.blocks_a_slot;
    const std::int32_t step_rows =
        (rows.slots_a_block < b.slots - step * rows.slots_a_block ? rows.slots_a_block
                                                                  : b.slots - step * rows.slots_a_block) *
        rows.group;
    const std::int32_t within = index % rows.blocks_a_slot * attend_rows_a_block();
    b.first_row = step * rows.slots_a_block * rows.group + within;
    b.rows = step_rows - within < attend_rows_a_block() ? step_rows - within : attend_rows_a_block();
    b.attended = static_cast<std::int32_t>(rows.block_cost(step, b.kept, b.slots) - attend_block_cost);
    return b;
  }
  /// Rows of a whole block.
  __device__ std::int32_t attend_rows_a_block() const {
    return rows.blocks_a_slot == 1 ? rows.slots_a_block * rows.group
                                   : (rows.group + rows.blocks_a_slot - 1) / rows.blocks_a_slot;
  }
};

/// A place in the virtual lists of all blocks.
struct attend_cut {
  std::int32_t group = 0;
  std::int32_t block = 0;
  std::int32_t position = 0;
  std::int64_t left = 0;  ///< cost of the block behind the cut
};
struct attend_range {
  attend_cut begin, end;
  std::int64_t share = 0;
};

template <int Threads>
struct attend_plan_memory {
  using scan = cub::BlockScan<std::int64_t, Threads, cub::BLOCK_SCAN_WARP_SCANS>;
  attend_range range;
  typename scan::TempStorage scan_memory;
};

/// Where in group g the cost `x` falls.
template <storage T>
__device__ attend_cut cut_in_group(const attend_launch<T>& launch, std::int32_t g, std::int64_t x) {
  const device_block b = launch.group_at(g);
  std::int32_t step = 0, behind = launch.rows.steps(b.slots);
  while (behind - step > 1) {
    const std::int32_t middle = (step + behind) / 2;
    (launch.rows.cost_before(middle, b.kept, b.slots) <= x ? step : behind) = middle;
  }
  x -= launch.rows.cost_before(step, b.kept, b.slots);
  const std::int64_t cost = launch.rows.block_cost(step, b.kept, b.slots);
  const std::int64_t blocks = x / cost, within = x - blocks * cost;
  attend_cut cut;
  cut.group = g;
  cut.block = static_cast<std::int32_t>(step * launch.rows.blocks_a_slot + blocks);
  cut.position = within < attend_block_cost
                     ? 0
                     : static_cast<std::int32_t>(within - attend_block_cost) / attend_tile * attend_tile;
  cut.left = cost - within;
  return cut;
}

/// The share of this CTA. All of its threads call.
template <int Threads, storage T>
__device__ attend_range find_range(const attend_launch<T>& launch, attend_plan_memory<Threads>& memory) {
  using scan = typename attend_plan_memory<Threads>::scan;
  const std::int32_t groups = launch.groups();
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  std::int64_t mine = 0, total = 0, before = 0;
  for (std::int32_t g = thread; g < groups; g += Threads) mine += launch.group_cost(g);
  scan(memory.scan_memory).ExclusiveSum(mine, before, total);
  const std::int64_t even = (total + gridDim.x - 1) / gridDim.x;
  const std::int64_t share = even < attend_least_share ? attend_least_share : even;
  if (thread == 0) {
    memory.range.begin = memory.range.end = {groups, 0, 0, 0};
    memory.range.share = share;
  }
  const std::int64_t first = share * blockIdx.x, last = first + share;
  std::int64_t passed = 0;
  for (std::int32_t at = 0; at < groups; at += Threads) {
    __syncthreads();
    const std::int32_t g = at + thread;
    if (groups > Threads) {
      mine = g < groups ? launch.group_cost(g) : 0;
      scan(memory.scan_memory).ExclusiveSum(mine, before, total);
    }
    before += passed;
    if (before <= first && first < before + mine) memory.range.begin = cut_in_group(launch, g, first - before);
    if (before <= last && last < before + mine) memory.range.end = cut_in_group(launch, g, last - before);
    passed += total;
  }
  __syncthreads();
  return memory.range;
}

}  // namespace specattn::inline v0_1::detail
