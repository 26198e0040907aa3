// What the device's attend() divides and exchanges: query rows into blocks, the positions of all blocks into shares, a CTA
// each (attend/cut.cuh), whose parts of a block meet in the workspace.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../../attend.hpp"
#include "../../attention_state.hpp"
#include "../context.cuh"
#include "../device/copy.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

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
  SPECATTN_HD std::int32_t steps(std::int32_t slots) const {
    if (slots <= slots_a_block) return slots > 0 ? 1 : 0;  // a division is slow, and hardly ever needed
    return (slots + slots_a_block - 1) / slots_a_block;
  }
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

/// The shares that work on a block, adjacent ones: the one that begins it and the `count - 1` after it.
struct attend_parts {
  std::int32_t first = 0;
  std::int32_t count = 0;
  std::int32_t mine = 0;
};
/// Where part p of a block that share `first` begins lies in the exchange.
__device__ __forceinline__ std::int32_t part_place(std::int32_t first, std::int32_t p) {
  return 2 * (first + p) + (p == 0 ? 1 : 0);
}

/// Where the parts of one row of q lie, as the share that begins the row's block leaves it for the merge.
struct alignas(16) attend_row_parts {
  std::int32_t first = 0;    ///< share
  std::int32_t count = 0;    ///< of parts; where it is one there is nothing to merge
  std::int32_t row = 0;      ///< of the block
  std::int32_t entries = 0;  ///< to be recorded; -1: the row is not
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
  attend_row_parts* rows = nullptr;     ///< [slots, q_heads]
  std::int32_t pitch = 0;               ///< head_dim in whole 16 bytes

  std::size_t lay_out(std::byte* base, std::size_t shares, std::size_t q_rows, std::int32_t head_dim) {
    pitch = (head_dim + 3) / 4 * 4;
    std::size_t bytes = 0;
    const auto take = [&](auto*& array, std::size_t count) {
      using element = std::remove_reference_t<decltype(*array)>;
      if (base != nullptr) array = reinterpret_cast<element*>(base + bytes);
      bytes += (count * sizeof(element) + 255) / 256 * 256;
    };
    take(sums, 2 * shares * attend_rows * static_cast<std::size_t>(pitch));
    take(states, 2 * shares * attend_rows);
    take(finished, q_rows);
    take(rows, q_rows);
    return bytes;
  }
};

/// What memory holds about a group (sequence, kv head).
struct attend_group {
  std::int32_t slots_begin = 0;
  std::int32_t slots_end = 0;
  std::int32_t kv_len = 0;
  std::int32_t cache_row = 0;
  std::int32_t count = keep_all;

  __device__ bool operator==(const attend_group& b) const {
    return slots_begin == b.slots_begin && slots_end == b.slots_end && kv_len == b.kv_len &&
           cache_row == b.cache_row && count == b.count;
  }
};

/// What a launch is asked for; passed by value.
template <storage T>
struct attend_launch {
  attend_args<T, cuda> args;
  float scale = 1.0f;
  row_division rows{1, 1};
  attend_exchange exchange{};
  std::int32_t stages = 2;     ///< tiles of positions that a warp has under way or at hand
  bool behind_append = false;  ///< the kernel before wrote q and the slots' rows of the cache, and nothing else

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

  /// Entries that a row of a block leaves in the recording; -1: it is not recorded.
  __device__ std::int32_t entries_of(const device_block& b, int row) const {
    return records() && recorded(b, row) ? recorded_length(b.kept + slot_of(b, row) + 1) : -1;
  }
  /// Says where the parts of a block's row are.
  __device__ void tell_parts(const device_block& b, int row, const attend_parts& parts) const {
    const std::ptrdiff_t slot = b.sequence_slot + slot_of(b, row);
    exchange.rows[slot * args.q.extent(1) + head_of(b, row)] = {parts.first, parts.count, row, entries_of(b, row)};
  }

  /// What memory says of a group.
  __device__ attend_group read_group(std::int32_t g) const {
    const auto sequence =
        static_cast<std::int32_t>(static_cast<std::uint32_t>(g) / static_cast<std::uint32_t>(args.kv.kv_heads));
    const std::ptrdiff_t list = sequence * args.kept_sequence_stride + g - sequence * args.kv.kv_heads;
    attend_group group;
    group.slots_begin = read_now(&args.slot_offsets[sequence]);
    group.slots_end = read_now(&args.slot_offsets[sequence + 1]);
    group.kv_len = read_now(&args.kv_lens[sequence]);
    group.cache_row = args.cache_rows.empty() ? sequence : read_now(&args.cache_rows[sequence]);
    if (!args.kept.counts.empty()) group.count = read_now(&args.kept.counts[list]);
    return group;
  }
  /// What the blocks of a group share. A count outside a list's row is cut to it, and numbers that are not written yet
  /// make no more blocks than q has slots.
  __device__ device_block group_of(std::int32_t g, const attend_group& group) const {
    device_block b;
    b.sequence =
        static_cast<std::int32_t>(static_cast<std::uint32_t>(g) / static_cast<std::uint32_t>(args.kv.kv_heads));
    b.kv_head = g - b.sequence * args.kv.kv_heads;
    b.sequence_slot = group.slots_begin;
    const std::int32_t slots = group.slots_end - group.slots_begin, all = static_cast<std::int32_t>(args.q.extent(0));
    b.slots = slots < 0 ? 0 : slots < all ? slots : all;
    b.kv_len = b.kept = group.kv_len < 0 ? 0 : group.kv_len;
    b.cache_row = group.cache_row;
    if (group.count == keep_all) return b;
    b.masked = args.slot_masks.empty() ? 0 : 1;
    const auto most = static_cast<std::int32_t>(args.kept.capacity() < b.kv_len ? args.kept.capacity() : b.kv_len);
    b.kept = group.count < 0 ? 0 : group.count < most ? group.count : most;
    return b;
  }
  __device__ device_block group_at(std::int32_t g) const { return group_of(g, read_group(g)); }
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
  std::uint32_t left = 0;  ///< cost of the block after the cut
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

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
