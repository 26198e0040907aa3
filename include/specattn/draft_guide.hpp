// The draft's attention of this round guides the target: the paper's rule, and mixtures of signals.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "alignment.hpp"
#include "buffer.hpp"
#include "guide.hpp"
#include "importance.hpp"
#include "select.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

namespace detail {

/// What a decoder keeps for a draft_guide: scratch of a round, and what the rounds before attended to.
template <backend B>
struct draft_guide_memory {
  /// fp16 on cuda: the pass is bound by memory bandwidth.
  using importance_type = std::conditional_t<std::same_as<B, cuda>, fp16, float>;

  std::int32_t max_sequences = 0;
  std::int32_t max_positions = 0;
  std::int32_t max_rows = 1;  ///< of importance a group: recorded steps that are selected from one by one
  std::int32_t steps = 0;
  buffer<importance_type, B> importance;
  buffer<std::int32_t, B> lengths;
  buffer<float, B> history_weights;  ///< [sequences, groups, positions]: attention_history
  buffer<std::int32_t, B> history_positions;
  buffer<std::int32_t, B> history_counts;
};

/// What a draft_guide is, on either backend: a rule and a mixture, and nothing of a text.
template <class Guide, backend B>
class draft_guide_base : public remembering_guide<Guide, draft_guide_memory<B>> {
  using base = remembering_guide<Guide, draft_guide_memory<B>>;

 public:
  using backend_type = B;
  using memory = draft_guide_memory<B>;
  using base::prepare;
  using base::workspace_bytes;

  draft_guide_base() = default;
  draft_guide_base(const alignment& from, const selection_rule& rule) : rule_(rule) {
    from.check();
    target_layers_ = from.target.layers;
    target_kv_heads_ = from.target.kv_heads;
    groups_ = target_layers_ * target_kv_heads_;
    mixture_ = resident_mixture<B>(make_sparse_mixture(from));
  }

  const selection_rule& rule() const { return rule_; }
  void set_rule(const selection_rule& rule) {
    expects(rule.rows == rule_.rows || !prepared_,
            "draft_guide: how rows combine is fixed once prepare() has allocated for it");
    rule_ = rule;
  }

  void prepare(const guide_setup& setup, memory& m) {
    const signal_set& signals = mixture_.signals;
    expects(setup.target.layers == target_layers_ && setup.target.kv_heads == target_kv_heads_,
            "draft_guide: the alignment is for a target of ", target_layers_, " layers × ", target_kv_heads_,
            " kv_heads, this one has ", setup.target.layers, " × ", setup.target.kv_heads);
    expects(setup.draft.layers == signals.draft_layers && setup.draft.q_heads == signals.draft_q_heads,
            "draft_guide: the alignment is for a draft of ", signals.draft_layers, " layers × ",
            signals.draft_q_heads, " q_heads, this one has ", setup.draft.layers, " × ", setup.draft.q_heads);
    expects(setup.recorded_steps >= 1, "draft_guide: at least one draft step must be recorded a round");
    prepared_ = true;
    m.max_positions = setup.max_positions;
    m.max_rows = rule_.rows == combine::unite ? setup.recorded_steps : 1;
    m.steps = setup.recorded_steps;
    m.max_sequences = setup.max_sequences;
    const auto cells = static_cast<std::size_t>(groups_) * static_cast<std::size_t>(m.max_positions);
    m.importance =
        buffer<typename memory::importance_type, B>(static_cast<std::size_t>(m.max_sequences * m.max_rows) * cells);
    m.lengths = buffer<std::int32_t, B>(static_cast<std::size_t>(m.max_sequences * groups_));
    if (signals.history) {
      m.history_weights = buffer<float, B>(static_cast<std::size_t>(m.max_sequences) * cells);
      m.history_positions = buffer<std::int32_t, B>(static_cast<std::size_t>(m.max_sequences) * cells);
      m.history_counts = buffer<std::int32_t, B>(static_cast<std::size_t>(m.max_sequences * groups_));
    }
  }

  guide_needs needs() const { return {true, mixture_.signals.history}; }

  std::size_t workspace_bytes(const context<B>& ctx, const memory& m) const {
    return (std::max)(
        {importance_workspace_bytes(ctx, mixture_, m.steps, m.max_positions, m.max_sequences),
         select_workspace_bytes(ctx, std::ptrdiff_t{m.max_sequences} * groups_, m.max_rows, m.max_positions, rule_)});
  }

 protected:
  /// One row a group needs no combining.
  selection_rule rule_for(std::ptrdiff_t rows) const {
    selection_rule rule = rule_;
    if (rule.rows == combine::mean && rows == 1) rule.rows = combine::unite;
    return rule;
  }
  /// The history of cache rows `row_of`; none where the mixture has no such signal.
  attention_history<B> history_of(const memory& m, view<const std::int32_t, 1, B> row_of) const {
    if (m.history_counts.empty()) return {};
    return {{m.history_weights.data(), {m.max_sequences, groups_, m.max_positions}},
            {m.history_positions.data(), {m.max_sequences, groups_, m.max_positions}},
            {m.history_counts.data(), {m.max_sequences, groups_}},
            row_of};
  }

  selection_rule rule_;
  resident_mixture<B> mixture_;
  std::int32_t target_layers_ = 0;
  std::int32_t target_kv_heads_ = 0;
  std::int32_t groups_ = 0;
  bool prepared_ = false;  // some decoder has allocated for the rule
};

}  // namespace detail

/// Importance is the alignment's mixture of the draft's weights (with recency, sinks and the target's own previous
/// round where the alignment has those signals); the rule selects from it. With `alignment::layer_map_only()` and
/// `rule.rows == combine::unite` it is the paper's method: the draft steps' sets united.
///
/// A rule with rows == combine::unite selects from each recorded step and unites; any other averages the steps first,
/// which is cheaper and, at equal reduction, as good.
template <backend B = cpu>
class draft_guide : public detail::draft_guide_base<draft_guide<B>, B> {
  using base = detail::draft_guide_base<draft_guide<B>, B>;

 public:
  using memory = typename base::memory;
  using base::after_verify;
  using base::before_verify;
  using base::forget;

  draft_guide() = default;
  /// \throws contract_error when the alignment is inconsistent
  draft_guide(const alignment& from, const selection_rule& rule) : base(from, rule) {}

  template <storage T>
  void before_verify(context<B>& ctx, round_state<T, B>& round, memory& m) {
    const std::int32_t sequences = round.sequences();
    const std::int32_t longest = sequences == 0 ? 0 : *std::max_element(round.kv_lens.begin(), round.kv_lens.end());
    const view<float, 3, B> out(m.importance.data(),
                                {std::ptrdiff_t{groups_} * sequences, m.max_rows, (std::max)(longest, 1)});
    for (std::int32_t s = 0; s < sequences; ++s) weigh(ctx, round, s, out, m);
    weight_rows<float, B> from;
    from.weights = out;
    from.kv_lens = m.lengths.shaped({std::ptrdiff_t{groups_} * sequences});
    select(ctx, from, this->rule_for(m.max_rows), round.kept);
    for (std::int32_t s = 0; s < sequences; ++s) {
      if (steps_of(round, s) > 0) continue;
      for (std::int32_t layer = 0; layer < target_layers_; ++layer) round.keep_everything(layer, s);
    }
  }

  /// Takes the mean over a round's emitted slots and the group's heads as the next round's history.
  template <storage T>
  void after_verify(context<B>& ctx, round_state<T, B>& round, memory& m) {
    if (!mixture_.signals.history) return;
    ctx.parallel_for(std::ptrdiff_t{round.sequences()} * groups_, [&](std::ptrdiff_t i, int) {
      remember(round, static_cast<std::int32_t>(i / groups_), static_cast<std::int32_t>(i % groups_), m);
    });
  }

  /// Forgets a cache row's history: its sequence has ended.
  void forget(std::int32_t cache_row, memory& m) {
    if (!m.history_counts.empty()) std::fill_n(m.history_counts.data() + cache_row * groups_, groups_, 0);
  }

 private:
  template <storage T>
  static std::int32_t steps_of(const round_state<T, B>& round, std::int32_t s) {
    return round.draft_steps.empty() ? 0 : round.draft_steps[static_cast<std::size_t>(s)];
  }

  /// The importance of one sequence, whose groups lie sequences * kv_heads apart from layer to layer.
  template <storage T>
  void weigh(context<B>& ctx, round_state<T, B>& round, std::int32_t s, view<float, 3, B> out, memory& m) {
    const std::int32_t kv_len = round.kv_lens[static_cast<std::size_t>(s)];
    const std::int32_t steps = steps_of(round, s);
    const bool skip = steps == 0 || round.dense[static_cast<std::size_t>(s)] != 0;
    for (std::int32_t g = 0; g < groups_; ++g) {
      m.lengths.data()[round.group(g / target_kv_heads_, s, g % target_kv_heads_)] = skip ? 0 : kv_len;
    }
    if (skip) return;
    const view<const std::int32_t, 1, B> row(round.cache_rows.data() + s, {1});
    importance_args<B> args;
    args.draft_weights = sequence_weights(round, s, steps);
    const auto& masses = round.draft_masses;
    args.masses = {
        masses.data() + s * masses.stride(2), {steps, masses.extent(1), 1, masses.extent(3)}, masses.strides()};
    args.kv_len = kv_len;
    args.separate_steps = m.max_rows > 1;
    args.history = this->history_of(m, row);
    const std::ptrdiff_t group_stride = out.stride(0);
    const std::ptrdiff_t sequence_stride = target_kv_heads_ * group_stride;
    args.out = {out.data() + s * sequence_stride,
                {target_layers_, 1, target_kv_heads_, args.separate_steps ? steps : 1, out.extent(2)},
                {round.sequences() * sequence_stride, sequence_stride, group_stride, out.stride(1), 1}};
    mix_importance(ctx, mixture_, args);
    // A sequence that drafted fewer steps than others leaves its last rows zero: an empty row adds no position.
    for (std::int32_t g = 0; args.separate_steps && g < groups_; ++g) {
      for (std::int32_t r = steps; r < m.max_rows; ++r) {
        float* row_out = &out(round.group(g / target_kv_heads_, s, g % target_kv_heads_), r, 0);
        std::fill(row_out, row_out + kv_len, 0.0f);
      }
    }
  }

  template <storage T>
  static view<const float, 5, B> sequence_weights(const round_state<T, B>& round, std::int32_t s,
                                                  std::int32_t steps) {
    const auto& all = round.draft_weights;
    return {all.data() + s * all.stride(2), {steps, all.extent(1), 1, all.extent(3), all.extent(4)}, all.strides()};
  }

  template <storage T>
  void remember(const round_state<T, B>& round, std::int32_t s, std::int32_t g, memory& m) {
    if (round.accepted[static_cast<std::size_t>(s)] < 0) return;  // its round is void
    const std::int32_t kv_len = round.kv_lens[static_cast<std::size_t>(s)];
    const std::int32_t first_slot = round.slot_offsets[static_cast<std::size_t>(s)];
    const std::int32_t begin = round.replayed[static_cast<std::size_t>(s)];
    const std::int32_t used = round.accepted[static_cast<std::size_t>(s)] + 1;
    const std::int32_t head = g % target_kv_heads_;
    const auto heads_a_group = static_cast<std::int32_t>(round.target_weights.extent(2)) / target_kv_heads_;
    const std::ptrdiff_t group = round.group(g / target_kv_heads_, s, head);
    const std::int32_t count = round.kept.counts[group];
    const std::int32_t attended = count == keep_all ? kv_len : count;
    const std::ptrdiff_t row = round.cache_rows[static_cast<std::size_t>(s)] * std::ptrdiff_t{groups_} + g;
    sum_rows(round, g / target_kv_heads_, first_slot + begin, used, head * heads_a_group, heads_a_group,
             attended + begin, m.history_weights.data() + row * m.max_positions);
    m.history_counts.data()[row] = count == keep_all ? keep_all : count + begin + used;
    if (count == keep_all) return;
    std::int32_t* positions = m.history_positions.data() + row * m.max_positions;
    for (std::int32_t i = 0; i < count; ++i) positions[i] = round.kept.positions(group, i);
    for (std::int32_t i = 0; i < begin + used; ++i) positions[count + i] = kv_len + i;
  }

  /// sums[i] = the mean over `used` slots and a group's heads of entry i of their recorded rows: what they attended
  /// to of the prefix (and of replayed slots), then the tail, of which the j-th slot has j + 1 entries.
  template <storage T>
  static void sum_rows(const round_state<T, B>& round, std::int32_t layer, std::int32_t first_slot, std::int32_t used,
                       std::int32_t first_head, std::int32_t heads, std::int32_t attended, float* sums) {
    std::fill_n(sums, attended + used, 0.0f);
    for (std::int32_t j = 0; j < used; ++j) {
      for (std::int32_t q = first_head; q < first_head + heads; ++q) {
        const float* row = &round.target_weights(layer, first_slot + j, q, 0);
        for (std::int32_t i = 0; i < attended + j + 1; ++i) sums[i] += row[i];
      }
    }
    const float share = 1.0f / static_cast<float>(used * heads);
    for (std::int32_t i = 0; i < attended + used; ++i) sums[i] *= share;
  }

  using base::groups_;
  using base::mixture_;
  using base::target_kv_heads_;
  using base::target_layers_;
};

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
