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
inline constexpr int attend_block_cost = 448;   ///< positions that starting a block is worth

/// Query rows of one sequence and kv head that are worked on together: slot and head of the group, slots slowest.
/// They attend to one virtual list: the kept prefix (all of it, or a list), then the tail.
struct alignas(16) device_block {
  std::int32_t sequence = 0;
  std::int32_t kv_head = 0;
  std::int32_t sequence_slot = 0;  ///< row of q where the sequence's slots begin
  std::int32_t slots = 0;          ///< of the sequence
  std::int32_t kv_len = 0;
  std::int32_t kept = 0;
  std::int32_t first_slot = 0;  ///< of the sequence
  std::int32_t first_head = 0;  ///< of the group
  std::int32_t rows = 0;
  std::int32_t attended = 0;  ///< virtual positions of the last row
  std::int32_t parts = 1;     ///< shares that work on it
  std::int32_t masked = 0;    ///< whether slots read different entries of the list
};

/// Blocks hold whole slots, or a slot that has more rows than a block is several.
struct row_division {
  std::int32_t group = 1;
  std::int32_t slots_a_block = 1;
  std::int32_t blocks_a_slot = 1;
  std::int32_t heads_a_block = 1;
  std::uint32_t group_inverse = 0;  ///< 2^16 / group rounded up; 0 where a block is of one slot

  row_division(std::int32_t group_rows, std::int32_t block_rows)
      : group(group_rows),
        slots_a_block(group_rows < block_rows ? block_rows / group_rows : 1),
        blocks_a_slot((group_rows + block_rows - 1) / block_rows),
        heads_a_block((group_rows + blocks_a_slot - 1) / blocks_a_slot),
        group_inverse(slots_a_block == 1 ? 0 : static_cast<std::uint32_t>((65535 + group_rows) / group_rows)) {}

  /// The slot of a block's row, from its first.
  SPECATTN_HD std::int32_t slot(std::int32_t row) const {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(row) * group_inverse >> 16);
  }
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
  float* sums = nullptr;              ///< [2 * shares, attend_rows, pitch]
  attention_state* states = nullptr;  ///< [2 * shares, attend_rows]
  device_block* open = nullptr;       ///< [shares] the block that goes on; of no parts where there is none
  std::int32_t pitch = 0;             ///< head_dim in whole 16 bytes

  std::size_t lay_out(std::byte* base, std::size_t shares, std::int32_t head_dim) {
    pitch = (head_dim + 3) / 4 * 4;
    std::size_t bytes = 0;
    const auto take = [&](auto*& array, std::size_t count) {
      using element = std::remove_reference_t<decltype(*array)>;
      if (base != nullptr) array = reinterpret_cast<element*>(base + bytes);
      bytes += (count * sizeof(element) + 255) / 256 * 256;
    };
    take(sums, 2 * shares * attend_rows * static_cast<std::size_t>(pitch));
    take(states, 2 * shares * attend_rows);
    take(open, shares);
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
  /// Of a block's row: the slot of the sequence, and the query head.
  __device__ int slot_of(const device_block& b, int row) const { return b.first_slot + rows.slot(row); }
  __device__ int head_of(const device_block& b, int row) const {
    return b.kv_head * rows.group + b.first_head + row - rows.slot(row) * rows.group;
  }
  /// The slots that attend to a virtual position of a masked block, a bit each; the tail's are all set.
  __device__ std::uint32_t slots_at(const device_block& b, std::int32_t at) const {
    return at < b.kept ? args.slot_masks(b.sequence * args.kept_sequence_stride + b.kv_head, at) : ~0u;
  }
  __device__ bool recorded(const device_block& b, int row) const {
    return args.recording.slots == record_slots::all || slot_of(b, row) == b.slots - 1;
  }
  __device__ float* recording_of(const device_block& b, int row) const {
    const std::ptrdiff_t at =
        args.recording.slots == record_slots::newest ? b.sequence : b.sequence_slot + slot_of(b, row);
    return &args.recording.weights(at, head_of(b, row), 0);
  }
  /// Of the entries that a row leaves, those that the recording has room for.
  __device__ std::int32_t recorded_length(std::int32_t attended) const {
    const std::ptrdiff_t room = args.recording.weights.extent(2);
    return attended < room ? attended : static_cast<std::int32_t>(room);
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
    b.masked = args.slot_masks.empty() ? 0 : 1;
    const auto most = static_cast<std::int32_t>(args.kept.capacity() < b.kv_len ? args.kept.capacity() : b.kv_len);
    b.kept = count < 0 ? 0 : count < most ? count : most;
    return b;
  }
  /// Of all blocks of a group.
  __device__ std::int64_t group_cost(const device_block& b) const {
    return rows.cost_before(rows.steps(b.slots), b.kept, b.slots);
  }
  /// Block `index` of a group, whose common part is `b`.
  __device__ device_block block_of(device_block b, std::int32_t index) const {
    const std::int32_t step = rows.blocks_a_slot == 1 ? index : index / rows.blocks_a_slot;
    b.first_slot = step * rows.slots_a_block;
    if (rows.blocks_a_slot == 1) {
      const std::int32_t slots = b.slots - b.first_slot;
      b.rows = (slots < rows.slots_a_block ? slots : rows.slots_a_block) * rows.group;
    } else {
      b.first_head = (index - step * rows.blocks_a_slot) * rows.heads_a_block;
      const std::int32_t heads = rows.group - b.first_head;
      b.rows = heads < rows.heads_a_block ? heads : rows.heads_a_block;
    }
    b.attended = static_cast<std::int32_t>(rows.block_cost(step, b.kept, b.slots) - attend_block_cost);
    return b;
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
  device_block first;  ///< the block that the range begins in
  typename scan::TempStorage scan_memory;
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
  cut.left = cost - x;
  const auto position = static_cast<std::int32_t>(x) - attend_block_cost;
  cut.position = position < 0 ? 0 : position / attend_tile * attend_tile;
  return cut;
}

/// total / shares, rounded up. Divisions of 64 bits are slow, and hardly ever needed.
__device__ __forceinline__ std::int64_t even_share(std::int64_t total, std::uint32_t shares) {
  if (total <= INT32_MAX) return (static_cast<std::uint32_t>(total) + shares - 1) / shares;
  return (total + shares - 1) / shares;
}

/// Finds the share of this CTA; all of its threads call.
template <int Threads, storage T>
__device__ void find_range(const attend_launch<T>& launch, attend_plan_memory<Threads>& memory) {
  using scan = typename attend_plan_memory<Threads>::scan;
  const std::int32_t groups = launch.groups();
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  device_block group;
  std::int64_t mine = 0, total = 0, before = 0;
  for (std::int32_t g = thread; g < groups; g += Threads) {
    group = launch.group_at(g);
    mine += launch.group_cost(group);
  }
  scan(memory.scan_memory).ExclusiveSum(mine, before, total);
  const std::int64_t even = even_share(total, gridDim.x);
  const std::int64_t share = even < attend_least_share ? attend_least_share : even;
  const std::int64_t first = share * blockIdx.x, last = first + share;
  if (thread == 0) {
    memory.range.share = share;
    if (first >= total) memory.range.begin = {groups, 0, 0, 0};
    if (last >= total) memory.range.end = {groups, 0, 0, 0};
  }
  std::int64_t passed = 0;
  for (std::int32_t at = 0; at < groups; at += Threads) {
    const std::int32_t g = at + thread;
    if (groups > Threads) {
      __syncthreads();
      if (g < groups) group = launch.group_at(g);
      mine = g < groups ? launch.group_cost(group) : 0;
      scan(memory.scan_memory).ExclusiveSum(mine, before, total);
    }
    before += passed;
    if (before <= first && first < before + mine) {
      memory.range.begin = cut_in_group(launch, g, group, first - before);
      memory.first = launch.block_of(group, memory.range.begin.block);
    }
    if (before <= last && last < before + mine) memory.range.end = cut_in_group(launch, g, group, last - before);
    passed += total;
  }
  __syncthreads();
}

}  // namespace specattn::inline v0_1::detail
