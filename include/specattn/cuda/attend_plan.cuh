// How the device's attend() divides a pass: query rows into blocks, the positions of all blocks into one equal share
// for each CTA. Every CTA finds its own share from the lengths and counts as they are in memory; a fixed grid, no
// plan before the launch, and nothing on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

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
  std::int32_t attended = 0;   ///< virtual positions of the last row
  std::int32_t cache_row = 0;  ///< of the block table
  std::int32_t masked = 0;     ///< whether slots read different entries of the list
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

/// The shares that work on a block, adjacent ones: the one that begins it and `count - 1` behind it.
struct attend_parts {
  std::int32_t first = 0;
  std::int32_t count = 0;
  std::int32_t mine = 0;

  /// Where part p lies in the exchange.
  __device__ std::int32_t place(std::int32_t p) const { return 2 * (first + p) + (p == 0 ? 1 : 0); }
};

/// A block that several shares work on, as the first of them leaves it for the merge; of no parts: there is none.
struct attend_open {
  device_block block;
  attend_parts parts;
};

/// A row's end: what makes its recorded scores its weights.
struct alignas(16) attend_finished {
  float max = 0.0f;
  float scale = 0.0f;        ///< 1 / the sum
  std::int32_t entries = 0;  ///< recorded
};

/// What CTAs leave for each other: two parts a share at most, one of a block that came from the share before and one
/// of a block that goes on in the next; and for the sweep that ends recordings.
struct attend_exchange {
  float* sums = nullptr;                ///< [2 * shares, attend_rows, pitch]
  attention_state* states = nullptr;    ///< [2 * shares, attend_rows]
  attend_finished* finished = nullptr;  ///< [slots, q_heads]
  attend_open* open = nullptr;          ///< [shares] the block that a share begins and others go on with
  std::int32_t pitch = 0;               ///< head_dim in whole 16 bytes

  std::size_t lay_out(std::byte* base, std::size_t shares, std::size_t rows, std::int32_t head_dim) {
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
    take(finished, rows);
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
    b.sequence =
        static_cast<std::int32_t>(static_cast<std::uint32_t>(g) / static_cast<std::uint32_t>(args.kv.kv_heads));
    b.kv_head = g - b.sequence * args.kv.kv_heads;
    b.sequence_slot = args.slot_offsets[b.sequence];
    b.slots = args.slot_offsets[b.sequence + 1] - b.sequence_slot;
    b.kv_len = b.kept = args.kv_lens[b.sequence];
    b.cache_row = args.cache_rows.empty() ? b.sequence : args.cache_rows[b.sequence];
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
  std::uint32_t left = 0;  ///< cost of the block behind the cut
};
/// What a CTA works on. `parts` is of its only block, where shares do not cross from one block to the next.
struct attend_range {
  attend_cut begin, end;
  std::uint32_t share = 0;  ///< cost; the largest number where it is more than any block can cost
  attend_parts parts;
};

/// The parts of a block of which this CTA's range has positions from `at` on, to the range's end where it is `open`.
__device__ __forceinline__ attend_parts parts_of(const device_block& b, const attend_range& range,
                                                 const attend_cut& at, bool open) {
  if (range.parts.count > 0) return range.parts;
  attend_parts parts;
  const auto here = static_cast<std::int32_t>(blockIdx.x);
  if (at.position >
      0) {  // positions come in tiles, so that a share which begins this far in a block found some before
    constexpr std::uint32_t first_tile = attend_block_cost + attend_tile;
    const std::uint32_t passed = static_cast<std::uint32_t>(b.attended) + attend_block_cost - at.left;
    parts.mine = static_cast<std::int32_t>(1 + (passed - first_tile) / range.share);
  }
  parts.first = here - parts.mine;
  parts.count = parts.mine + 1;
  if (open) parts.count += static_cast<std::int32_t>(1 + (range.end.left - 1) / range.share);
  return parts;
}

/// Of all blocks, or of those of some groups.
struct attend_totals {
  std::int64_t cost = 0;
  std::uint32_t blocks = 0;
  std::uint32_t longest = 0;  ///< virtual positions of a block
  std::uint32_t most = 0;     ///< blocks of a group
};

template <int Threads>
struct attend_plan_memory {
  attend_range range;
  device_block first;  ///< the block that the range begins in
  attend_totals warps[Threads / 32];
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

/// Totals of the whole CTA from its threads', and the cost of the threads before this one.
template <int Threads>
__device__ __forceinline__ attend_totals add_up(const attend_totals& mine, attend_totals (&warps)[Threads / 32],
                                                std::int64_t& before) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  attend_totals sum = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const std::int64_t below = __shfl_up_sync(~0u, sum.cost, distance);
    if (lane >= distance) sum.cost += below;
  }
  before = sum.cost - mine.cost;
  sum.blocks = __reduce_add_sync(~0u, mine.blocks);
  sum.longest = __reduce_max_sync(~0u, mine.longest);
  sum.most = __reduce_max_sync(~0u, mine.most);
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  sum = attend_totals{};
#pragma unroll
  for (int w = 0; w < Threads / 32; ++w) {
    const attend_totals& of = warps[w];
    if (w < warp) before += of.cost;
    sum.cost += of.cost;
    sum.blocks += of.blocks;
    sum.longest = sum.longest > of.longest ? sum.longest : of.longest;
    sum.most = sum.most > of.most ? sum.most : of.most;
  }
  return sum;
}

/// Equal shares of all blocks' costs, wherever they end.
template <storage T>
__device__ void cut_anywhere(const attend_launch<T>& launch, std::int32_t begin, std::int32_t end, device_block group,
                             std::int64_t before, std::int64_t total, attend_range& range, device_block& block) {
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
    if (end - begin > 1) group = launch.group_at(g);
    const std::int64_t behind = before + launch.group_cost(group);
    if (before <= first && first < behind) {
      range.begin = cut_in_group(launch, g, group, first - before);
      block = launch.block_of(group, range.begin.block);
    }
    if (before <= last && last < behind) range.end = cut_in_group(launch, g, group, last - before);
    before = behind;
  }
}

/// `parts` CTAs for each block, or fewer where it is short. Every group has `blocks` blocks.
template <storage T>
__device__ void cut_each_block(const attend_launch<T>& launch, std::int32_t begin, std::int32_t end,
                               const device_block& group, std::uint32_t parts, std::uint32_t blocks,
                               attend_range& range, device_block& block) {
  const std::uint32_t index = blockIdx.x / parts, mine = blockIdx.x - index * parts;
  const auto g = static_cast<std::int32_t>(index / blocks), b = static_cast<std::int32_t>(index % blocks);
  if (threadIdx.x == 0 && g >= launch.groups()) range.begin.group = 1, range.end.group = 0, range.parts = {};
  if (g < begin || g >= end) return;
  block = launch.block_of(end - begin > 1 ? launch.group_at(g) : group, b);
  const std::uint32_t tiles = (static_cast<std::uint32_t>(block.attended) + attend_tile - 1) / attend_tile;
  const std::uint32_t even = (tiles + parts - 1) / parts, least = attend_least_share / attend_tile;
  const std::uint32_t each = even < least ? least : even;
  const std::uint32_t count = (tiles + each - 1) / each;
  const auto position = static_cast<std::int32_t>(mine * each * attend_tile);
  range.begin = {g, b, position, 0};
  range.end = {g, b, position + static_cast<std::int32_t>(each) * attend_tile, 0};
  range.parts = {static_cast<std::int32_t>(index * parts), static_cast<std::int32_t>(count),
                 static_cast<std::int32_t>(mine)};
  if (mine + 1 == count) range.end = {g, b + 1, 0, 0};
  if (mine >= count) range.begin.group = g + 1;  // nothing to do
}

/// Finds the share of this CTA; all of its threads call. A thread has as many adjacent groups as are needed. Where
/// blocks are equal enough and few enough, each has CTAs of its own, so that none begins a second one; else shares cross
/// from one block to the next.
template <int Threads, storage T>
__device__ void find_range(const attend_launch<T>& launch, attend_plan_memory<Threads>& memory) {
  const std::int32_t groups = launch.groups(), each = (groups + Threads - 1) / Threads;
  const std::int32_t begin = static_cast<std::int32_t>(threadIdx.x) * each;
  const std::int32_t end = begin + each < groups ? begin + each : groups;
  device_block group;
  attend_totals mine;
  for (std::int32_t g = begin; g < end; ++g) {
    group = launch.group_at(g);
    const auto blocks = static_cast<std::uint32_t>(launch.rows.blocks(group.slots));
    const auto longest = static_cast<std::uint32_t>(group.kept + group.slots);
    mine.cost += launch.group_cost(group);
    mine.blocks += blocks;
    mine.longest = mine.longest > longest ? mine.longest : longest;
    mine.most = mine.most > blocks ? mine.most : blocks;
  }
  std::int64_t before = 0;
  const attend_totals all = add_up<Threads>(mine, memory.warps, before);
  bool aligned =
      all.blocks > 0 && all.blocks <= gridDim.x && all.most * static_cast<std::uint32_t>(groups) == all.blocks;
  const std::uint32_t parts = aligned ? gridDim.x / all.blocks : 1;
  if (aligned) {  // a share may be a little longer than an even one: fewer CTAs read as fast
    const std::int64_t longest = (all.longest + parts - 1) / parts;
    aligned = longest * gridDim.x <= all.cost + all.cost / 16;
  }
  if (aligned) {
    cut_each_block(launch, begin, end, group, parts, all.most, memory.range, memory.first);
  } else {
    cut_anywhere(launch, begin, end, group, before, all.cost, memory.range, memory.first);
  }
  __syncthreads();
}

}  // namespace specattn::inline v0_1::detail
