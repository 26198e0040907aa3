// recompute_steps() on the CPU: tasks of a few hundred positions of one layer, sequence and kv head.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../recompute.hpp"
#include "context.hpp"
#include "key_products.hpp"
#include "lanes.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// One call of recompute_steps().
template <storage T>
class recompute_steps_pass {
 public:
  explicit recompute_steps_pass(const recompute_steps_args<T, cpu>& a)
      : a_(a), kv_heads_(a.kv.kv_heads), group_(static_cast<std::int32_t>(a.q.extent(3)) / a.kv.kv_heads) {
    scale_ = a.scale != 0.0f ? a.scale : 1.0f / std::sqrt(static_cast<float>(a.kv.head_dim));
    for (std::int32_t s = 0; s < sequences(); ++s) longest_ = (std::max)(longest_, checked_length(s));
  }

  void run(context<cpu>& ctx) {
    const std::ptrdiff_t tasks = (longest_ + key_block - 1) / key_block,
                         lists = a_.q.extent(1) * sequences() * kv_heads_;
    ctx.parallel_for(lists * tasks, [&](std::ptrdiff_t i, int) {
      one_task(i / tasks / kv_heads_, static_cast<std::int32_t>(i / tasks % kv_heads_),
               static_cast<std::int32_t>(i % tasks) * key_block);
    });
    ctx.parallel_for(a_.weights.extent(0) * a_.q.extent(1) * sequences(), [&](std::ptrdiff_t i, int) {
      const std::ptrdiff_t row = i / (a_.q.extent(1) * sequences()), part = i % (a_.q.extent(1) * sequences());
      for (std::ptrdiff_t head = 0; head < a_.q.extent(3); ++head) add_up(row, part, head);
    });
  }

 private:
  std::int32_t sequences() const { return static_cast<std::int32_t>(a_.kv_lens.extent(0)); }
  std::int32_t cache_row(std::int32_t s) const { return a_.cache_rows.empty() ? s : a_.cache_rows[s]; }

  std::int32_t checked_length(std::int32_t s) const {
    const std::int32_t length = a_.kv_lens[s], row = cache_row(s);
    expects(length >= 0 && length <= a_.weights.extent(4), "recompute_steps: sequence ", s, " has kv_len ", length,
            ", the recording holds ", a_.weights.extent(4));
    for (std::ptrdiff_t step = 0; step < a_.q.extent(0); ++step)
      expects(a_.slot_of(step, s) < a_.q.extent(2), "recompute_steps: sequence ", s, " asks by slot ",
              a_.slot_of(step, s), " of ", a_.q.extent(2));
    if (length == 0) return 0;
    expects(row >= 0 && row < a_.kv.block_table.extent(0), "recompute_steps: sequence ", s, " is cache row ", row,
            " of ", a_.kv.block_table.extent(0));
    expects(a_.kv.page_shift >= 31 || (length - 1) >> a_.kv.page_shift < a_.kv.block_table.extent(1),
            "recompute_steps: sequence ", s, " has ", length, " positions, its block table ",
            a_.kv.block_table.extent(1), " pages of ", a_.kv.page_shift >= 31 ? 0 : 1 << a_.kv.page_shift);
    return length;
  }

  /// Positions [begin, begin + key_block) of all rows of a layer and sequence (`part`) and kv head.
  void one_task(std::ptrdiff_t part, std::int32_t kv_head, std::int32_t begin) const {
    const std::ptrdiff_t layer = part / sequences();
    const auto s = static_cast<std::int32_t>(part % sequences());
    const int count = std::clamp(a_.kv_lens[s] - begin, 0, key_block);
    if (count == 0) return;
    const T* keys[key_block];
    for (int i = 0; i < count; ++i) keys[i] = a_.kv.key(cache_row(s), begin + i, kv_head) + layer * a_.layer_stride;
    const auto steps = static_cast<std::int32_t>(a_.q.extent(0)), rows = steps * group_;
    for (std::int32_t first = 0; first < rows; first += key_rows) {
      const int n = (std::min)(rows - first, key_rows);
      float scores[key_rows][key_block] = {};
      const float scale = scale_ * (a_.key_scales.empty() ? 1.0f : a_.key_scales(layer, kv_head));
      for (int d = 0; d < a_.kv.head_dim; d += key_depth) {
        alignas(64) float q[key_rows][key_depth] = {};
        for (int r = 0; r < n; ++r) {
          const std::int32_t slot = a_.slot_of((first + r) % steps, s);
          if (slot < 0) continue;
          const float* from = &a_.q((first + r) % steps, layer, slot, kv_head * group_ + (first + r) / steps, d);
          for (int i = 0; i < (std::min)(key_depth, a_.kv.head_dim - d); ++i) q[r][i] = from[i] * scale;
        }
        add_key_products(scores, q, n, keys, count, d, a_.kv.head_dim);
      }
      for (int r = 0; r < n; ++r)
        leave(scores[r], (first + r) % steps, layer, s, kv_head * group_ + (first + r) / steps, begin, count);
    }
  }

  /// Steps of a head come one after another, the first of them first.
  void leave(const float* scores, std::int32_t step, std::ptrdiff_t layer, std::int32_t s, std::int32_t head,
             std::int32_t begin, int count) const {
    const bool mean = a_.weights.extent(0) == 1;
    const std::int32_t slot = a_.slot_of(step, s);
    const float share = slot < 0 ? 0.0f : mean ? 1.0f / static_cast<float>(a_.q.extent(0)) : 1.0f;
    const float lse = slot < 0 ? 0.0f : a_.lse(step, layer, slot, head);
    float* row = &a_.weights(mean ? 0 : step, layer, s, head, begin);
    const bool adds = mean && step > 0;
    int i = 0;
    for (; i + lanes::width <= count; i += lanes::width) {
      const lanes weight = exp_any(subtract(lanes::load(scores + i), lanes::broadcast(lse)));
      fmadd(lanes::broadcast(share), weight, adds ? lanes::load(row + i) : lanes::zero()).store(row + i);
    }
    for (; i < count; ++i) row[i] = share * exp_any(scores[i] - lse) + (adds ? row[i] : 0.0f);
  }

  void add_up(std::ptrdiff_t row, std::ptrdiff_t part, std::ptrdiff_t head) const {
    const std::ptrdiff_t layer = part / sequences(), s = part % sequences();
    const float* weights = &a_.weights(row, layer, s, head, 0);
    const std::int32_t count = a_.kv_lens[s], whole = count / lanes::width * lanes::width;
    lanes sum = lanes::zero();
    for (std::int32_t i = 0; i < whole; i += lanes::width) sum = add(sum, lanes::load(weights + i));
    if (whole < count) sum = add(sum, load_first(weights + whole, count - whole));
    a_.masses(row, layer, s, head) = sum_of_lanes(sum);
  }

  const recompute_steps_args<T, cpu>& a_;
  std::int32_t kv_heads_, group_;
  std::int32_t longest_ = 0;
  float scale_ = 1.0f;
};

template <>
struct recompute_steps_impl<cpu> {
  static std::size_t workspace_bytes(const context<cpu>&, std::ptrdiff_t, std::ptrdiff_t) { return 0; }

  template <storage T>
  static void run(context<cpu>& ctx, const recompute_steps_args<T, cpu>& args) {
    recompute_steps_pass<T>(args).run(ctx);
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail
