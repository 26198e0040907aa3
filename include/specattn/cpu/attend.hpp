// attend() on the CPU.
//
// The positions a slot attends to form one virtual list: the kept prefix (all of it, or the selection), then the
// tail. The list is cut at fixed virtual indices into splits, a split into tiles. Inside a split an online softmax
// runs over the tiles; the splits' states are merged in order. Slots only end at different places of the same list,
// so nothing about a slot's arithmetic depends on the other slots, on the threads, or on whether the list was given.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../attend.hpp"
#include "../attention_state.hpp"
#include "attend_plan.hpp"
#include "attend_tile.hpp"
#include "context.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// One call of attend().
template <storage T>
class attend_pass {
 public:
  attend_pass(context<cpu>& ctx, const attend_args<T, cpu>& a)
      : a_(a), plan_(a, ctx.threads()), memory_(plan_.memory()), group_(plan_.group()) {
    std::byte* workspace = ctx.workspace(memory_.total(ctx.threads()), "attend");
    plan_.divide(workspace, ctx.threads());
    members_ = workspace + memory_.blocks;
    parts_ = members_ + static_cast<std::size_t>(ctx.threads()) * memory_.member;
    scale_ = a.scale != 0.0f ? a.scale : 1.0f / std::sqrt(static_cast<float>(a.kv.head_dim));
  }

  void run(context<cpu>& ctx) {
    switch (a_.kv.head_dim) {
      case 32:
        return run_with<32>(ctx);
      case 64:
        return run_with<64>(ctx);
      case 128:
        return run_with<128>(ctx);
      default:
        return run_with<0>(ctx);
    }
  }

 private:
  template <int HeadDim>
  void run_with(context<cpu>& ctx) {
    const tile_kernel<T, HeadDim> kernel{a_.kv.head_dim};
    if (!plan_.shared()) {
      // The team takes the highest index first, which suits a prefill: its later blocks are longer.
      ctx.parallel_for(plan_.blocks(),
                       [&](std::ptrdiff_t i, int member) { whole_block(kernel, plan_.block(i), member); });
    } else {
      ctx.parallel_for(plan_.parts(),
                       [&](std::ptrdiff_t i, int member) { one_part(kernel, static_cast<std::int32_t>(i), member); });
    }
  }

  struct member_memory {
    tile_scratch tile;
    attention_state* states;  ///< of the whole row
    float* sums;
    float* peaks;
  };
  member_memory memory_of(int member) const {
    std::byte* p = members_ + static_cast<std::size_t>(member) * memory_.member;
    const auto n = static_cast<std::size_t>(memory_.rows);
    const auto stride = static_cast<std::size_t>(memory_.stride);
    const auto take = [&p]<class U>(U*& to, std::size_t count) {
      to = reinterpret_cast<U*>(p);
      p += attend_memory::line(count * sizeof(U));
    };
    member_memory m;
    m.tile.stride = memory_.stride;
    take(m.tile.q, n * stride);
    take(m.tile.scores, n * tile_positions);
    take(m.tile.unpacked, unpacked_floats(memory_.stride));
    take(m.tile.offsets, tile_positions);
    take(m.tile.next_offsets, tile_positions);
    take(m.tile.counts, n);
    take(m.tile.states, n);
    take(m.tile.sums, n * stride);
    take(m.states, n);
    take(m.sums, n * stride);
    take(m.peaks, n * static_cast<std::size_t>(memory_.tiles));
    return m;
  }
  void aim_at_part(tile_scratch& tile, std::int32_t part) const {
    std::byte* p = parts_ + static_cast<std::size_t>(part) * memory_.part;
    tile.states = reinterpret_cast<attention_state*>(p);
    tile.sums = reinterpret_cast<float*>(
        p + attend_memory::line(static_cast<std::size_t>(memory_.rows) * sizeof(attention_state)));
  }
  float* peaks_of(std::int32_t block) const {
    return reinterpret_cast<float*>(parts_ + static_cast<std::size_t>(memory_.max_shared_parts) * memory_.part +
                                    static_cast<std::size_t>(block) * memory_.peaks);
  }

  template <class Kernel>
  void whole_block(const Kernel& kernel, const row_block& block, int member) {
    member_memory m = memory_of(member);
    begin_at(kernel, m.tile, block, 0);
    pack_queries(m.tile, block);
    clear_rows(m, block.rows);
    for (std::int32_t split = 0; split < block.splits; ++split) {
      run_split(kernel, m.tile, block, split, m.peaks);
      merge_rows(m, m.tile, block.rows);
    }
    finish_rows(m, block, m.peaks);
  }

  template <class Kernel>
  void one_part(const Kernel& kernel, std::int32_t part, int member) {
    row_block& block = plan_.block(plan_.block_of_part(part));
    member_memory m = memory_of(member);
    float* peaks = peaks_of(plan_.block_of_part(part));
    begin_at(kernel, m.tile, block, part - block.first_part);
    pack_queries(m.tile, block);
    aim_at_part(m.tile, part);
    run_split(kernel, m.tile, block, part - block.first_part, peaks);
    // not std::atomic_ref, which clang's library lacks before 19
    if (__atomic_fetch_sub(&block.open, 1, __ATOMIC_ACQ_REL) != 1) return;
    clear_rows(m, block.rows);  // the last one to come merges, in the order of the splits
    for (std::int32_t split = 0; split < block.splits; ++split) {
      aim_at_part(m.tile, block.first_part + split);
      merge_rows(m, m.tile, block.rows);
    }
    finish_rows(m, block, peaks);
  }

  int slot_of(const row_block& b, int row) const { return (b.first_row + row) / group_; }
  int head_of(const row_block& b, int row) const { return b.kv_head * group_ + (b.first_row + row) % group_; }

  void pack_queries(const tile_scratch& tile, const row_block& block) const {
    for (int row = 0; row < block.rows; ++row) {
      const std::int32_t slot = a_.slot_offsets[block.sequence] + slot_of(block, row);
      const float* q = &a_.q(slot, head_of(block, row), 0);
      float* to = tile.q + row * tile.stride;
      const float scale = scale_ * a_.kv.key_scale(block.kv_head);
      for (int d = 0; d < a_.kv.head_dim; ++d) to[d] = q[d * a_.q.stride(2)] * scale;
      std::fill(to + a_.kv.head_dim, to + tile.stride, 0.0f);
    }
  }
  static void clear_rows(const member_memory& m, int rows) {
    std::fill_n(m.states, rows, attention_state{});
    std::fill_n(m.sums, rows * m.tile.stride, 0.0f);
  }

  /// Where the rows of virtual positions [begin, begin + n) lie, the last repeated to the end of the tile.
  void find_rows(std::ptrdiff_t* offsets, const row_block& block, std::int32_t begin, int n) const {
    const std::int32_t kv_len = a_.kv_lens[block.sequence];
    const std::int32_t cache_row = a_.cache_rows.empty() ? block.sequence : a_.cache_rows[block.sequence];
    const bool listed = block.kept < kv_len;
    const int from_list = std::clamp(block.kept - begin, 0, n);
    const std::int32_t* list = nullptr;
    if (listed && from_list > 0)
      list = &a_.kept.positions(block.sequence * a_.kept_sequence_stride + block.kv_head, begin);
    const std::ptrdiff_t list_stride = listed ? a_.kept.positions.stride(1) : 0;
    const std::int32_t tail = kv_len - block.kept;  // a virtual position after the list is this much further on
    if (a_.kv.page_shift >= 31) {
      const std::ptrdiff_t base = a_.kv.offset(cache_row, 0, block.kv_head);
      const std::ptrdiff_t stride = a_.kv.position_stride;
      int i = 0;
      for (; listed && i < from_list; ++i) offsets[i] = base + list[i * list_stride] * stride;
      for (; i < n; ++i) offsets[i] = base + (begin + i + tail) * stride;
    } else {
      int i = 0;
      for (; listed && i < from_list; ++i) offsets[i] = a_.kv.offset(cache_row, list[i * list_stride], block.kv_head);
      for (; i < n; ++i) offsets[i] = a_.kv.offset(cache_row, begin + i + tail, block.kv_head);
    }
    std::fill(offsets + n, offsets + tile_positions, offsets[n - 1]);
  }

  /// Finds and prefetches the first tile of a split; each tile prefetches the next.
  template <class Kernel>
  void begin_at(const Kernel& kernel, const tile_scratch& tile, const row_block& block, std::int32_t split) const {
    const std::int32_t begin = split * split_positions;
    const int n = (std::min)(block.attended - begin, tile_positions);
    find_rows(tile.offsets, block, begin, n);
    kernel.fetch(a_.kv.keys, tile.offsets, n);
  }

  /// One split of a block's positions into tile.states and tile.sums. tile.offsets must hold its first tile, and
  /// holds the first of the next split after it.
  template <class Kernel>
  void run_split(const Kernel& kernel, tile_scratch& tile, const row_block& block, std::int32_t split,
                 float* peaks) const {
    std::fill_n(tile.states, block.rows, attention_state{});
    std::fill_n(tile.sums, block.rows * tile.stride, 0.0f);
    const std::int32_t end = (std::min)(block.attended, (split + 1) * split_positions);
    for (std::int32_t begin = split * split_positions; begin < end; begin += tile_positions) {
      const int n = (std::min)(end - begin, tile_positions);
      const std::int32_t next = (std::min)(block.attended - begin - n, tile_positions);
      find_rows(tile.next_offsets, block, next > 0 ? begin + n : begin, next > 0 ? next : n);
      int first_row = block.rows;
      for (int row = block.rows; row-- > 0;) {
        tile.counts[row] = std::clamp(block.kept + slot_of(block, row) + 1 - begin, 0, n);
        if (tile.counts[row] > 0) first_row = row;
      }
      kernel.score(tile, first_row, block.rows, a_.kv.keys, a_.kv.values, n);
      if (!a_.slot_masks.empty()) mask_slots(tile, block, first_row, begin);
      for (int row = first_row; row < block.rows; ++row) soften_row(tile, row);
      if (!a_.recording.weights.empty()) record(tile, block, first_row, begin, peaks);
      kernel.add(tile, first_row, block.rows, a_.kv.keys, a_.kv.values, n);
      std::swap(tile.offsets, tile.next_offsets);
    }
  }

  /// Takes the list's positions that a row's slot does not read out of its scores.
  void mask_slots(const tile_scratch& tile, const row_block& block, int first_row, std::int32_t begin) const {
    const std::ptrdiff_t g = block.sequence * a_.kept_sequence_stride + block.kv_head;
    if (a_.kept.counts[g] == keep_all) return;
    for (int row = first_row; row < block.rows; ++row) {
      const int slot = slot_of(block, row);
      float* scores = tile.scores + row * tile_positions;
      const int listed = (std::min)(tile.counts[row], block.kept - begin);
      for (int i = 0; i < listed; ++i)
        if (!slot_reads(a_.slot_masks(g, begin + i), slot)) scores[i] = -std::numeric_limits<float>::infinity();
    }
  }

  static void merge_rows(const member_memory& m, const tile_scratch& part, int rows) {
    for (int row = 0; row < rows; ++row) {
      if (part.states[row].sum == 0.0f) continue;
      const merged_state both = merge(m.states[row], part.states[row]);
      m.states[row] = both.state;
      const lanes scale_a = lanes::broadcast(both.scale_a);
      const lanes scale_b = lanes::broadcast(both.scale_b);
      float* to = m.sums + row * part.stride;
      const float* from = part.sums + row * part.stride;
      for (int d = 0; d < part.stride; d += lanes::width)
        fmadd(lanes::load(to + d), scale_a, multiply(lanes::load(from + d), scale_b)).store(to + d);
    }
  }

  void finish_rows(const member_memory& m, const row_block& block, const float* peaks) const {
    for (int row = 0; row < block.rows; ++row) {
      const std::int32_t slot = a_.slot_offsets[block.sequence] + slot_of(block, row);
      const int head = head_of(block, row);
      const float scale = finish_scale(m.states[row]) * a_.kv.value_scale(block.kv_head);
      const float* sums = m.sums + row * m.tile.stride;
      float* out = &a_.out(slot, head, 0);
      for (int d = 0; d < a_.kv.head_dim; ++d) out[d * a_.out.stride(2)] = sums[d] * scale;
      if (!a_.lse.empty()) a_.lse(slot, head) = log_sum_exp(m.states[row]);
      if (!a_.recording.weights.empty() && recorded(block, row))
        finish_record(block, row, m.states[row], peaks + row * memory_.tiles);
    }
  }

  bool recorded(const row_block& block, int row) const {
    const std::int32_t slots = a_.slot_offsets[block.sequence + 1] - a_.slot_offsets[block.sequence];
    return a_.recording.slots == record_slots::all || slot_of(block, row) == slots - 1;
  }
  float* recording_of(const row_block& block, int row) const {
    const std::int32_t at = a_.recording.slots == record_slots::newest
                                ? block.sequence
                                : a_.slot_offsets[block.sequence] + slot_of(block, row);
    return &a_.recording.weights(at, head_of(block, row), 0);
  }

  /// Leaves the tile's weights, relative to the maximum so far, and that maximum.
  void record(const tile_scratch& tile, const row_block& block, int first_row, std::int32_t begin,
              float* peaks) const {
    const std::ptrdiff_t stride = a_.recording.weights.stride(2);
    for (int row = first_row; row < block.rows; ++row) {
      if (!recorded(block, row)) continue;
      peaks[row * memory_.tiles + begin / tile_positions] = tile.states[row].max;
      const float* weights = tile.scores + row * tile_positions;
      float* to = recording_of(block, row) + begin * stride;
      if (stride == 1) {
        std::memcpy(to, weights, static_cast<std::size_t>(tile.counts[row]) * sizeof(float));
      } else {
        for (int i = 0; i < tile.counts[row]; ++i) to[i * stride] = weights[i];
      }
    }
  }
  /// Makes the recorded weights of a row relative to its final state.
  void finish_record(const row_block& block, int row, attention_state state, const float* peaks) const {
    const std::int32_t attended = block.kept + slot_of(block, row) + 1;
    const std::ptrdiff_t stride = a_.recording.weights.stride(2);
    float* weights = recording_of(block, row);
    for (std::int32_t begin = 0; begin < attended; begin += tile_positions) {
      const float peak = peaks[begin / tile_positions];
      const float scale = state.sum == 0.0f ? 0.0f : exp_nonpositive(peak - state.max) * finish_scale(state);
      const std::int32_t end = (std::min)(attended, begin + tile_positions);
      for (std::int32_t i = begin; i < end; ++i) weights[i * stride] *= scale;
    }
  }

  const attend_args<T, cpu>& a_;
  attend_plan<T> plan_;
  const attend_memory& memory_;
  int group_;
  float scale_ = 1.0f;
  std::byte* members_ = nullptr;
  std::byte* parts_ = nullptr;
};

template <>
struct attend_impl<cpu> {
  static std::size_t workspace_bytes(const context<cpu>& ctx, const attend_shape& shape) {
    return attend_memory(shape, ctx.threads()).total(ctx.threads());
  }
  template <storage T>
  static void run(context<cpu>& ctx, const attend_args<T, cpu>& args) {
    if (args.q.extent(0) == 0) return;
    attend_pass<T>(ctx, args).run(ctx);
  }

  static void keep_queries(const context<cpu>&, const view<const float, 3, cpu>& q, const view<float, 3, cpu>& to) {
    for (std::ptrdiff_t slot = 0; slot < q.extent(0); ++slot) {
      for (std::ptrdiff_t head = 0; head < q.extent(1); ++head) {
        for (std::ptrdiff_t d = 0; d < q.extent(2); ++d) to(slot, head, d) = q(slot, head, d);
      }
    }
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
