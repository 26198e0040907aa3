// The target's own attention guides it: the bound that other guides are read against. Slower than dense.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attend.hpp"
#include "buffer.hpp"
#include "guide.hpp"
#include "select.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// Scratch that a decoder keeps for an oracle_guide.
template <backend B = cpu>
struct oracle_memory {
  guide_setup setup;
  buffer<float, B> weights;   ///< [slots, q_heads, positions]
  buffer<float, B> gathered;  ///< [kv_heads, slots * heads, positions]
  buffer<float, B> out;
  buffer<std::int32_t, B> offsets, lens, rows, group_lens;
};

/// Before each layer attends, computes that layer's dense attention weights of the round's slots and selects from
/// them: rule.rows == combine::unite keeps the union over slots and heads, combine::mean selects once from their mean.
template <backend B = cpu>
class oracle_guide : public remembering_guide<oracle_guide<B>, oracle_memory<B>> {
  using base = remembering_guide<oracle_guide<B>, oracle_memory<B>>;

 public:
  using memory = oracle_memory<B>;
  using base::before_layer;
  using base::prepare;
  using base::workspace_bytes;

  oracle_guide() = default;
  explicit oracle_guide(const selection_rule& rule) : rule_(rule) {}

  void prepare(const guide_setup& setup, memory& m) {
    m.setup = setup;
    const auto slots = static_cast<std::size_t>(setup.max_slots);
    const auto heads = static_cast<std::size_t>(setup.target.q_heads);
    const auto capacity = static_cast<std::size_t>(setup.max_positions + setup.max_slots);
    m.weights = buffer<float, B>(slots * heads * capacity);
    m.gathered = buffer<float, B>(slots * heads * static_cast<std::size_t>(setup.max_positions));
    m.out = buffer<float, B>(slots * heads * static_cast<std::size_t>(setup.target.head_dim));
    m.offsets = buffer<std::int32_t, B>(static_cast<std::size_t>(setup.max_sequences) + 1);
    m.lens = buffer<std::int32_t, B>(static_cast<std::size_t>(setup.max_sequences));
    m.rows = buffer<std::int32_t, B>(static_cast<std::size_t>(setup.max_sequences));
    m.group_lens = buffer<std::int32_t, B>(static_cast<std::size_t>(setup.target.kv_heads));
  }

  std::size_t workspace_bytes(const context<B>& ctx, const memory& m) const {
    const std::ptrdiff_t rows =
        std::ptrdiff_t{m.setup.max_slots} * (m.setup.target.q_heads / (std::max)(1, m.setup.target.kv_heads));
    return select_workspace_bytes(ctx, m.setup.target.kv_heads, rows, m.setup.max_positions, rule_);
  }

  template <storage T>
  void before_layer(context<B>& ctx, round_state<T, B>& round, std::int32_t layer, view<const float, 3, B> q,
                    memory& m) {
    const auto sequences = static_cast<std::size_t>(round.sequences());
    std::copy_n(round.slot_offsets.begin(), sequences + 1, m.offsets.data());
    std::copy_n(round.kv_lens.begin(), sequences, m.lens.data());
    std::copy_n(round.cache_rows.begin(), sequences, m.rows.data());
    attend_args<T, B> args;
    args.q = q;
    args.kv = round.target_cache->layer(layer);
    args.slot_offsets = m.offsets.shaped({round.sequences() + 1});
    args.kv_lens = m.lens.shaped({round.sequences()});
    args.cache_rows = m.rows.shaped({round.sequences()});
    args.out = m.out.shaped({q.extent(0), q.extent(1), q.extent(2)});
    const std::ptrdiff_t capacity = m.setup.max_positions + m.setup.max_slots;
    args.recording = {m.weights.shaped({q.extent(0), q.extent(1), capacity}), record_slots::all};
    attend(ctx, args);
    for (std::int32_t s = 0; s < round.sequences(); ++s)
      select_sequence(ctx, round, layer, s, args.recording.weights, m);
  }

 private:
  template <storage T>
  void select_sequence(context<B>& ctx, round_state<T, B>& round, std::int32_t layer, std::int32_t s,
                       view<const float, 3, B> weights, memory& m) {
    const auto at = static_cast<std::size_t>(s);
    const std::ptrdiff_t group = round.group(layer, s, 0);
    if (round.dense[at] != 0 || round.kept.counts[group] == keep_all) return;
    const std::int32_t first = round.slot_offsets[at];
    const std::int32_t slots = round.slot_offsets[at + 1] - first;
    const std::int32_t kv_len = round.kv_lens[at];
    const std::ptrdiff_t heads_a_group = weights.extent(1) / round.kv_heads;
    weight_rows<float, B> from;
    from.weights = gather(weights, first, slots, heads_a_group, round.kv_heads, kv_len, m);
    std::fill_n(m.group_lens.data(), round.kv_heads, kv_len);
    from.kv_lens = m.group_lens.shaped({round.kv_heads});
    select(ctx, from, rule_, round.kept.slice(group, round.kv_heads));
  }

  /// [kv_heads, slots * heads, kv_len]: copied, so that a group's rows are evenly spaced.
  view<const float, 3, B> gather(view<const float, 3, B> weights, std::int32_t first, std::int32_t slots,
                                 std::ptrdiff_t heads, std::int32_t kv_heads, std::int32_t kv_len, memory& m) {
    view<float, 3, B> out(m.gathered.data(), {kv_heads, slots * heads, (std::max)(kv_len, 1)});
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
};

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
