// recompute() on the CPU: tasks of a few hundred positions of one sequence and kv head.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../recompute.hpp"
#include "context.hpp"
#include "key_products.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// One call of recompute().
template <storage T>
class recompute_pass {
 public:
  explicit recompute_pass(const recompute_args<T, cpu>& a)
      : a_(a), group_(static_cast<std::int32_t>(a.q.extent(1)) / a.kv.kv_heads) {
    scale_ = a.scale != 0.0f ? a.scale : 1.0f / std::sqrt(static_cast<float>(a.kv.head_dim));
    for (std::int32_t s = 0; s < sequences(); ++s) longest_ = (std::max)(longest_, checked_length(s));
  }

  void run(context<cpu>& ctx) {
    const std::int32_t tasks = (longest_ + key_block - 1) / key_block;
    ctx.parallel_for(std::ptrdiff_t{sequences()} * a_.kv.kv_heads * tasks, [&](std::ptrdiff_t i, int) {
      const std::ptrdiff_t list = i / tasks;
      one_task(static_cast<std::int32_t>(list / a_.kv.kv_heads), static_cast<std::int32_t>(list % a_.kv.kv_heads),
               static_cast<std::int32_t>(i % tasks) * key_block);
    });
  }

 private:
  std::int32_t sequences() const { return static_cast<std::int32_t>(a_.kv_lens.extent(0)); }
  std::int32_t slots(std::int32_t s) const { return a_.slot_offsets[s + 1] - a_.slot_offsets[s]; }
  bool records_all() const { return a_.recording.slots == record_slots::all; }

  /// Entries of the longest row of a sequence; looks at every number the caller gave as data.
  std::int32_t checked_length(std::int32_t s) const {
    const std::int32_t first = a_.slot_offsets[s];
    const std::int32_t last = a_.slot_offsets[s + 1];
    const std::int32_t kv_len = a_.kv_lens[s];
    const std::int32_t row = a_.cache_rows.empty() ? s : a_.cache_rows[s];
    expects(first >= 0 && first <= last && last <= a_.q.extent(0), "recompute: sequence ", s, " has slots ", first,
            " … ", last, " of ", a_.q.extent(0));
    expects(kv_len >= 0 && kv_len <= INT32_MAX - (last - first), "recompute: sequence ", s, " has kv_len ", kv_len);
    if (first == last) return 0;
    expects(row >= 0 && row < a_.kv.block_table.extent(0), "recompute: sequence ", s, " is cache row ", row, " of ",
            a_.kv.block_table.extent(0));
    const std::int32_t length = kv_len + last - first;
    expects(a_.kv.page_shift >= 31 || (length - 1) >> a_.kv.page_shift < a_.kv.block_table.extent(1),
            "recompute: sequence ", s, " has ", length, " positions, its block table ", a_.kv.block_table.extent(1),
            " pages of ", a_.kv.page_shift >= 31 ? 0 : 1 << a_.kv.page_shift);
    std::int32_t longest = 0;
    for (std::int32_t head = 0; head < a_.kv.kv_heads; ++head) {
      const std::int32_t entries = checked_kept(s, head) + last - first;
      expects(entries <= a_.recording.weights.extent(2), "recompute: sequence ", s, " has ", entries,
              " weights a row, the recording holds ", a_.recording.weights.extent(2));
      longest = (std::max)(longest, entries);
    }
    return longest;
  }
  std::int32_t checked_kept(std::int32_t s, std::int32_t head) const {
    const std::int32_t count = kept(s, head);
    if (!listed(s, head) || count == 0) return count;
    const std::ptrdiff_t g = s * a_.kept_sequence_stride + head;
    expects(count > 0 && count <= a_.kept.capacity() && count <= a_.kv_lens[s], "recompute: selection group ", g,
            " has count ", count, ", capacity ", a_.kept.capacity(), ", kv_len ", a_.kv_lens[s]);
    const std::int32_t first = a_.kept.positions(g, 0);
    const std::int32_t last = a_.kept.positions(g, count - 1);
    expects(first >= 0 && last < a_.kv_lens[s], "recompute: selection group ", g, " keeps positions ", first, " … ",
            last, ", outside kv_len ", a_.kv_lens[s]);
    return count;
  }
  bool listed(std::int32_t s, std::int32_t head) const {
    return !a_.kept.counts.empty() && a_.kept.counts[s * a_.kept_sequence_stride + head] != keep_all;
  }
  std::int32_t kept(std::int32_t s, std::int32_t head) const {
    return listed(s, head) ? a_.kept.counts[s * a_.kept_sequence_stride + head] : a_.kv_lens[s];
  }

  /// Entries [begin, begin + key_block) of all rows of a sequence and kv head.
  void one_task(std::int32_t s, std::int32_t head, std::int32_t begin) const {
    if (slots(s) == 0) return;
    const std::int32_t first_slot = records_all() ? 0 : slots(s) - 1;
    const std::int32_t rows = (slots(s) - first_slot) * group_;
    const T* keys[key_block];
    const int count = find_keys(keys, s, head, begin);
    for (std::int32_t first_row = 0; first_row < rows; first_row += key_rows) {
      const int n = (std::min)(rows - first_row, key_rows);
      float scores[key_rows][key_block] = {};
      for (int d = 0; d < a_.kv.head_dim; d += key_depth) {
        alignas(64) float q[key_rows][key_depth] = {};
        for (int r = 0; r < n; ++r) {
          const std::int32_t slot = a_.slot_offsets[s] + first_slot + (first_row + r) / group_;
          const float* from = &a_.q(slot, head * group_ + (first_row + r) % group_, 0);
          for (int i = 0; i < (std::min)(key_depth, a_.kv.head_dim - d); ++i)
            q[r][i] = from[(d + i) * a_.q.stride(2)] * scale_ * a_.kv.key_scale(head);
        }
        add_key_products(scores, q, n, keys, count, d, a_.kv.head_dim);
      }
      for (int r = 0; r < n; ++r) {
        const std::int32_t slot = first_slot + (first_row + r) / group_;
        leave(scores[r], s, slot, head * group_ + (first_row + r) % group_, begin,
              (std::min)(count, kept(s, head) + slot + 1 - begin));
      }
    }
  }

  /// Where the rows of a task's virtual positions lie; returns how many there are.
  int find_keys(const T** keys, std::int32_t s, std::int32_t head, std::int32_t begin) const {
    const std::int32_t row = a_.cache_rows.empty() ? s : a_.cache_rows[s];
    const std::int32_t from_list = kept(s, head);
    const int count = std::clamp(from_list + slots(s) - begin, 0, key_block);
    for (int i = 0; i < count; ++i) {
      const std::int32_t at = begin + i;
      const std::int32_t position = at >= from_list   ? a_.kv_lens[s] + at - from_list
                                    : listed(s, head) ? a_.kept.positions(s * a_.kept_sequence_stride + head, at)
                                                      : at;
      keys[i] = a_.kv.key(row, position, head);
    }
    return count;
  }

  void leave(const float* scores, std::int32_t s, std::int32_t slot, std::int32_t q_head, std::int32_t begin,
             int count) const {
    const float lse = a_.lse(a_.slot_offsets[s] + slot, q_head);
    const std::ptrdiff_t row = records_all() ? a_.slot_offsets[s] + slot : s;
    for (int i = 0; i < count; ++i) a_.recording.weights(row, q_head, begin + i) = std::exp(scores[i] - lse);
  }

  const recompute_args<T, cpu>& a_;
  std::int32_t group_;
  std::int32_t longest_ = 0;
  float scale_ = 1.0f;
};

template <>
struct recompute_impl<cpu> {
  template <storage T>
  static void run(context<cpu>& ctx, const recompute_args<T, cpu>& args) {
    if (args.q.extent(0) == 0) return;
    recompute_pass<T>(args).run(ctx);
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
