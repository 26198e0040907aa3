// How the CPU's attend() divides a pass: blocks of query rows, parts of their positions, places in the workspace.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../attend.hpp"
#include "attend_tile.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Query rows of one sequence and kv head that are worked on together: slot and head of the group, slots slowest.
struct row_block {
  std::int32_t sequence = 0;
  std::int32_t kv_head = 0;
  std::int32_t first_row = 0;
  std::int32_t rows = 0;
  std::int32_t kept = 0;      ///< prefix positions of the virtual list
  std::int32_t attended = 0;  ///< virtual positions of the last row
  std::int32_t splits = 0;
  std::int32_t first_part = 0;  ///< of its splits, among all splits
  std::int32_t open = 0;        ///< splits not done yet
};

/// Where things lie in the workspace, in bytes. Every number grows with every field of the shape.
struct attend_memory {
  std::size_t blocks = 0;  ///< row_block, then (shared passes) the block of each part
  std::size_t member = 0;  ///< one member's scratch
  std::size_t part = 0;    ///< one split's states and sums
  std::size_t parts = 0;   ///< all of them
  std::size_t peaks = 0;   ///< one block's record of maxima: [rows, tiles]
  std::int32_t max_blocks = 0;
  std::int32_t max_shared_parts = 0;
  std::int32_t rows = 0;  ///< of a block at most
  std::int32_t tiles = 0;
  int stride = 0;

  static std::size_t line(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

  attend_memory(const attend_shape& s, int threads) {
    // As if every query head shared one kv head: with the true group, a shape of fewer kv heads could need more.
    const std::int64_t all_rows = std::int64_t{s.slots} * s.q_heads;
    const std::int64_t block_count = (all_rows / block_rows + s.sequences) * (std::max)(s.kv_heads, 1);
    const std::int64_t shared_blocks = (std::min<std::int64_t>)(block_count, shared_below(threads));
    const std::int64_t splits = s.kv_len / split_positions + 1;
    stride = padded_dim((std::max)(s.head_dim, 1));
    max_blocks = static_cast<std::int32_t>(block_count);
    max_shared_parts = static_cast<std::int32_t>(shared_blocks * splits);
    rows = static_cast<std::int32_t>((std::min<std::int64_t>)(all_rows, block_rows));
    tiles = s.kv_len / tile_positions + 1;
    const auto n = static_cast<std::size_t>(rows);
    const std::size_t row_bytes = static_cast<std::size_t>(stride) * sizeof(float);
    blocks = line(static_cast<std::size_t>(block_count) * sizeof(row_block)) +
             line(static_cast<std::size_t>(max_shared_parts) * sizeof(std::int32_t));
    part = line(n * sizeof(attention_state)) + line(n * row_bytes);
    peaks = line(n * static_cast<std::size_t>(tiles) * sizeof(float));
    member = line(n * row_bytes) + line(n * tile_positions * sizeof(float)) +
             line(unpacked_floats(stride) * sizeof(float)) + 2 * line(tile_positions * sizeof(std::ptrdiff_t)) +
             line(n * sizeof(std::int32_t)) + 2 * part + peaks;
    parts = static_cast<std::size_t>(max_shared_parts) * part + static_cast<std::size_t>(shared_blocks) * peaks;
  }
  /// Passes with fewer blocks than this may share a block's splits among members.
  static std::int64_t shared_below(int threads) { return threads > 1 ? 2 * threads : 0; }
  std::size_t total(int threads) const { return blocks + static_cast<std::size_t>(threads) * member + parts; }
};

/// The division of one call, checked: whatever the caller gave as data (offsets, lengths, counts) is looked at here,
/// before any thread starts.
template <storage T>
class attend_plan {
 public:
  attend_plan(const attend_args<T, cpu>& a, int threads)
      : a_(a), memory_(shape_of(a), threads), group_(static_cast<int>(a.q.extent(1)) / a.kv.kv_heads) {}

  const attend_memory& memory() const { return memory_; }
  int group() const { return group_; }
  /// Members share the splits of a block; otherwise each takes whole blocks.
  bool shared() const { return shared_; }
  std::int32_t blocks() const { return block_count_; }
  std::int32_t parts() const { return part_count_; }
  row_block& block(std::ptrdiff_t i) const { return blocks_[i]; }
  std::int32_t block_of_part(std::ptrdiff_t part) const { return part_blocks_[part]; }

  /// Lists the blocks, and decides whether members share their splits.
  void divide(std::byte* workspace, int threads) {
    blocks_ = reinterpret_cast<row_block*>(workspace);
    std::int32_t longest = 0;
    for (std::int32_t s = 0; s < static_cast<std::int32_t>(a_.kv_lens.extent(0)); ++s) {
      const std::int32_t slots = a_.slot_offsets[s + 1] - a_.slot_offsets[s];
      for (std::int32_t head = 0; slots > 0 && head < a_.kv.kv_heads; ++head) {
        const std::int32_t kept = checked_kept(s, head);
        check_recording(s, kept, slots);
        for (std::int32_t row = 0; row < slots * group_; row += block_rows) {
          row_block block;
          block.sequence = s;
          block.kv_head = head;
          block.first_row = row;
          block.rows = (std::min)(slots * group_ - row, block_rows);
          block.kept = kept;
          block.attended = kept + (row + block.rows - 1) / group_ + 1;
          block.splits = block.open = (block.attended - 1) / split_positions + 1;
          block.first_part = part_count_;
          part_count_ += block.splits;
          longest = (std::max)(longest, block.splits);
          blocks_[block_count_++] = block;
        }
      }
    }
    // Sharing costs a merge of states: only where whole blocks would leave members idle.
    shared_ = block_count_ < attend_memory::shared_below(threads) && longest > 1 &&
              std::int64_t{longest} * threads * 8 > std::int64_t{part_count_} * 9;
    if (!shared_) return;
    part_blocks_ = reinterpret_cast<std::int32_t*>(
        workspace + attend_memory::line(static_cast<std::size_t>(memory_.max_blocks) * sizeof(row_block)));
    for (std::int32_t b = 0; b < block_count_; ++b)
      std::fill_n(part_blocks_ + blocks_[b].first_part, blocks_[b].splits, b);
  }

 private:
  /// The shape that this pass needs; checks every number that the caller gave as data.
  static attend_shape shape_of(const attend_args<T, cpu>& a) {
    attend_shape shape;
    shape.sequences = static_cast<std::int32_t>(a.kv_lens.extent(0));
    shape.slots = static_cast<std::int32_t>(a.q.extent(0));
    shape.q_heads = static_cast<std::int32_t>(a.q.extent(1));
    shape.kv_heads = a.kv.kv_heads;
    shape.head_dim = a.kv.head_dim;
    for (std::int32_t s = 0; s < shape.sequences; ++s)
      shape.kv_len = (std::max)(shape.kv_len, checked_length(a, s, shape.slots));
    return shape;
  }
  /// kv_len plus slots of sequence s.
  static std::int32_t checked_length(const attend_args<T, cpu>& a, std::int32_t s, std::int32_t slots) {
    const std::int32_t first = a.slot_offsets[s];
    const std::int32_t last = a.slot_offsets[s + 1];
    const std::int32_t kv_len = a.kv_lens[s];
    const std::int32_t row = a.cache_rows.empty() ? s : a.cache_rows[s];
    expects(first >= 0 && first <= last && last <= slots, "attend: sequence ", s, " has slots ", first, " … ", last,
            " of ", slots);
    expects(kv_len >= 0 && kv_len <= INT32_MAX - (last - first), "attend: sequence ", s, " has kv_len ", kv_len);
    if (first == last) return 0;
    expects(row >= 0 && row < a.kv.block_table.extent(0), "attend: sequence ", s, " is cache row ", row, " of ",
            a.kv.block_table.extent(0));
    const std::int32_t length = kv_len + last - first;
    expects(a.kv.page_shift >= 31 || (length - 1) >> a.kv.page_shift < a.kv.block_table.extent(1),
            "attend: sequence ", s, " has ", length, " positions, its block table ", a.kv.block_table.extent(1),
            " pages of ", a.kv.page_shift >= 31 ? 0 : 1 << a.kv.page_shift);
    return length;
  }
  std::int32_t checked_kept(std::int32_t s, std::int32_t head) const {
    const std::int32_t kv_len = a_.kv_lens[s];
    if (a_.kept.counts.empty()) return kv_len;
    const std::ptrdiff_t g = s * a_.kept_sequence_stride + head;
    const std::int32_t count = a_.kept.counts[g];
    if (count == keep_all) return kv_len;
    const std::int32_t slots = a_.slot_offsets[s + 1] - a_.slot_offsets[s];
    expects(a_.slot_masks.empty() || slots <= most_masked_slots, "attend: sequence ", s, " has ", slots,
            " slots, a word of slot_masks ", most_masked_slots);
    expects(count >= 0 && count <= a_.kept.capacity() && count <= kv_len, "attend: selection group ", g,
            " has count ", count, ", capacity ", a_.kept.capacity(), ", kv_len ", kv_len);
    if (count > 0) {
      const std::int32_t first = a_.kept.positions(g, 0);
      const std::int32_t last = a_.kept.positions(g, count - 1);
      expects(first >= 0 && last < kv_len, "attend: selection group ", g, " keeps positions ", first, " … ", last,
              ", outside kv_len ", kv_len);
    }
    return count;
  }

  void check_recording(std::int32_t s, std::int32_t kept, std::int32_t slots) const {
    expects(a_.recording.weights.empty() || a_.recording.weights.extent(2) >= kept + slots, "attend: sequence ", s,
            " leaves ", kept + slots, " weights a row, the recording holds ", a_.recording.weights.extent(2));
  }

  const attend_args<T, cpu>& a_;
  attend_memory memory_;
  int group_;
  row_block* blocks_ = nullptr;
  std::int32_t* part_blocks_ = nullptr;
  std::int32_t block_count_ = 0;
  std::int32_t part_count_ = 0;
  bool shared_ = false;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
