// The target's own attention guides it: the bound that other guides are read against. Slower than dense.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attend.hpp"
#include "buffer.hpp"
#include "guide.hpp"
#include "select.hpp"

namespace specattn::inline v0_1 {

/// Before each layer attends, computes that layer's dense attention weights of the round's slots and selects from
/// them: rule.rows == combine::unite keeps the union over slots and heads, combine::mean selects once from their mean.
template <backend B = cpu>
class oracle_guide : public idle_guide {
 public:
  oracle_guide() = default;
  explicit oracle_guide(const selection_rule& rule) : rule_(rule) {}

  void prepare(const guide_setup& setup) {
    setup_ = setup;
    const auto slots = static_cast<std::size_t>(setup.max_slots);
    const auto heads = static_cast<std::size_t>(setup.target.q_heads);
    const auto capacity = static_cast<std::size_t>(setup.max_positions + setup.max_slots);
    weights_ = buffer<float, B>(slots * heads * capacity);
    gathered_ = buffer<float, B>(slots * heads * static_cast<std::size_t>(setup.max_positions));
    out_ = buffer<float, B>(slots * heads * static_cast<std::size_t>(setup.target.head_dim));
    offsets_ = buffer<std::int32_t, B>(static_cast<std::size_t>(setup.max_sequences) + 1);
    lens_ = buffer<std::int32_t, B>(static_cast<std::size_t>(setup.max_sequences));
    rows_ = buffer<std::int32_t, B>(static_cast<std::size_t>(setup.max_sequences));
    group_lens_ = buffer<std::int32_t, B>(static_cast<std::size_t>(setup.target.kv_heads));
  }

  std::size_t workspace_bytes(const context<B>& ctx) const {
    const std::ptrdiff_t rows =
        std::ptrdiff_t{setup_.max_slots} * (setup_.target.q_heads / (std::max)(1, setup_.target.kv_heads));
    return select_workspace_bytes(ctx, setup_.target.kv_heads, rows, setup_.max_positions, rule_);
  }

  template <storage T>
  void before_layer(context<B>& ctx, round_state<T, B>& round, std::int32_t layer, view<const float, 3, B> q) {
    const auto sequences = static_cast<std::size_t>(round.sequences());
    std::copy_n(round.slot_offsets.begin(), sequences + 1, offsets_.data());
    std::copy_n(round.kv_lens.begin(), sequences, lens_.data());
    std::copy_n(round.cache_rows.begin(), sequences, rows_.data());
    attend_args<T, B> args;
    args.q = q;
    args.kv = round.target_cache->layer(layer);
    args.slot_offsets = offsets_.shaped({round.sequences() + 1});
    args.kv_lens = lens_.shaped({round.sequences()});
    args.cache_rows = rows_.shaped({round.sequences()});
    args.out = out_.shaped({q.extent(0), q.extent(1), q.extent(2)});
    const std::ptrdiff_t capacity = setup_.max_positions + setup_.max_slots;
    args.recording = {weights_.shaped({q.extent(0), q.extent(1), capacity}), record_slots::all};
    attend(ctx, args);
    for (std::int32_t s = 0; s < round.sequences(); ++s)
      select_sequence(ctx, round, layer, s, args.recording.weights);
  }

 private:
  template <storage T>
  void select_sequence(context<B>& ctx, round_state<T, B>& round, std::int32_t layer, std::int32_t s,
                       view<const float, 3, B> weights) {
    const auto at = static_cast<std::size_t>(s);
    const std::ptrdiff_t group = round.group(layer, s, 0);
    if (round.dense[at] != 0 || round.kept.counts[group] == keep_all) return;
    const std::int32_t first = round.slot_offsets[at];
    const std::int32_t slots = round.slot_offsets[at + 1] - first;
    const std::int32_t kv_len = round.kv_lens[at];
    const std::ptrdiff_t heads_a_group = weights.extent(1) / round.kv_heads;
    importance<float, B> from;
    from.weights = gather(weights, first, slots, heads_a_group, round.kv_heads, kv_len);
    std::fill_n(group_lens_.data(), round.kv_heads, kv_len);
    from.kv_lens = group_lens_.shaped({round.kv_heads});
    select(ctx, from, rule_, round.kept.slice(group, round.kv_heads));
  }

  /// [kv_heads, slots * heads, kv_len]: copied, so that a group's rows are evenly spaced.
  view<const float, 3, B> gather(view<const float, 3, B> weights, std::int32_t first, std::int32_t slots,
                                 std::ptrdiff_t heads, std::int32_t kv_heads, std::int32_t kv_len) {
    view<float, 3, B> out(gathered_.data(), {kv_heads, slots * heads, (std::max)(kv_len, 1)});
    for (std::int32_t h = 0; h < kv_heads; ++h) {
      for (std::int32_t slot = 0; slot < slots; ++slot) {
        for (std::ptrdiff_t i = 0; i < heads; ++i) {
          const float* row = &weights(first + slot, h * heads + i, 0);
          std::copy_n(row, kv_len, &out(h, slot * heads + i, 0));
        }
      }
    }
    return out;
  }

  selection_rule rule_;
  guide_setup setup_;
  buffer<float, B> weights_;   // [slots, q_heads, positions]
  buffer<float, B> gathered_;  // [kv_heads, slots * heads, positions]
  buffer<float, B> out_;
  buffer<std::int32_t, B> offsets_, lens_, rows_, group_lens_;
};

}  // namespace specattn::inline v0_1
