// A round on the host: the slots of its passes, and what was drafted for whom.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "../buffer.hpp"
#include "../decode_options.hpp"
#include "../decode_plan.hpp"
#include "../decode_state.hpp"
#include "../model.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Host arrays of a pass, with room for the largest.
struct pass_arrays {
  pass_arrays() = default;
  pass_arrays(std::int32_t max_sequences, std::int32_t max_slots)
      : tokens(static_cast<std::size_t>(max_slots)),
        positions(static_cast<std::size_t>(max_slots)),
        logit_rows(static_cast<std::size_t>(max_slots)),
        slot_offsets(static_cast<std::size_t>(max_sequences) + 1),
        kv_lens(static_cast<std::size_t>(max_sequences)),
        cache_rows(static_cast<std::size_t>(max_sequences)) {}

  static std::size_t bytes(std::int32_t max_sequences, std::int32_t max_slots) {
    return (3 * static_cast<std::size_t>(max_slots) + 3 * static_cast<std::size_t>(max_sequences) + 1) *
           sizeof(std::int32_t);
  }

  void clear() { slots = rows = sequences = 0; }
  void begin_sequence(std::int32_t kv_len) {
    kv_lens.data()[sequences] = kv_len;
    slot_offsets.data()[sequences] = slots;
  }
  void add_slot(std::int32_t token, std::int32_t position, bool wants_logits) {
    if (wants_logits) logit_rows.data()[rows++] = slots;
    tokens.data()[slots] = token;
    positions.data()[slots++] = position;
  }
  void end_sequence() { slot_offsets.data()[++sequences] = slots; }
  /// A sequence whose slots are positions [from, to) of a text and want no logits.
  void add_text(std::int32_t row, std::span<const std::int32_t> text, std::int32_t from, std::int32_t to) {
    cache_rows.data()[sequences] = row;
    begin_sequence(from);
    for (std::int32_t i = from; i < to; ++i) add_slot(text[static_cast<std::size_t>(i)], i, false);
    end_sequence();
  }

  /// \param rows_of [sequences] cache rows
  pass_layout<cpu> layout(const std::int32_t* rows_of) const {
    return {slot_offsets.shaped({sequences + 1}), kv_lens.shaped({sequences}), {rows_of, {sequences}}};
  }

  forward_batch<> batch() const {
    const auto n = static_cast<std::size_t>(slots);
    return {{tokens.data(), n}, {positions.data(), n}, {logit_rows.data(), static_cast<std::size_t>(rows)}};
  }

  buffer<std::int32_t, cpu> tokens, positions, logit_rows, slot_offsets, kv_lens;
  buffer<std::int32_t, cpu> cache_rows;  ///< of add_text()'s sequences
  std::int32_t slots = 0;
  std::int32_t rows = 0;
  std::int32_t sequences = 0;
};

/// Who takes part in a round, in batch order, and what was drafted for them.
struct round_batch {
  round_batch(const decode_sizes& sizes, std::int32_t vocab)
      : rows(static_cast<std::size_t>(sizes.sequences)),
        draft_lengths(static_cast<std::size_t>(sizes.sequences)),
        draft_steps(static_cast<std::size_t>(sizes.sequences)),
        judged_offsets(static_cast<std::size_t>(sizes.sequences) + 1),
        drafted(static_cast<std::size_t>(sizes.judged)),
        probabilities(static_cast<std::size_t>(sizes.judged) * static_cast<std::size_t>(vocab)),
        failed(static_cast<std::size_t>(sizes.sequences)),
        draft_counts(static_cast<std::size_t>(sizes.sequences)) {}

  static std::size_t bytes(const decode_sizes& sizes, std::int32_t vocab) {
    const auto sequences = static_cast<std::size_t>(sizes.sequences), judged = static_cast<std::size_t>(sizes.judged);
    return sequences * (4 * sizeof(std::int32_t) + sizeof(std::uint8_t) + sizeof(decode_counts)) +
           sizeof(std::int32_t) + judged * (sizeof(std::int32_t) + static_cast<std::size_t>(vocab) * sizeof(float));
  }

  std::int32_t first_drafted(std::int32_t s) const { return judged_offsets.data()[s] - s; }
  std::int32_t& draft_length(std::int32_t s) const { return draft_lengths.data()[s]; }
  std::int32_t& steps(std::int32_t s) const { return draft_steps.data()[s]; }
  std::span<const std::int32_t> drafted_of(std::int32_t s) const {
    return {drafted.data() + first_drafted(s), static_cast<std::size_t>(draft_length(s))};
  }
  /// Takes a plan's rows, of which nothing is drafted yet.
  void begin(const round_plan& plan) {
    size = 0;
    judged_offsets.data()[0] = 0;
    for (const planned_row& row : plan.rows) {
      const std::int32_t s = size++;
      rows.data()[s] = row.row;
      draft_length(s) = row.drafts;
      steps(s) = row.steps;
      judged_offsets.data()[s + 1] = judged_offsets.data()[s] + row.drafts + 1;
    }
    std::fill_n(failed.data(), failed.size(), std::uint8_t{0});
    std::fill_n(draft_counts.data(), draft_counts.size(), decode_counts{});
  }
  /// Drops a sequence's drafted tokens from the `kept`-th on: the draft has failed there.
  void drop_drafts(std::int32_t s, std::int32_t kept) const {
    failed.data()[s] = 1;
    draft_length(s) = (std::min)(draft_length(s), kept);
    steps(s) = (std::min)(steps(s), kept);
  }
  bool any_failed() const {
    return std::any_of(failed.data(), failed.data() + size, [](std::uint8_t f) { return f != 0; });
  }
  /// After drafted tokens were dropped: moves the others, and what they were drawn from, together.
  void close_gaps(std::int32_t vocab) const {
    std::int32_t at = 0;
    for (std::int32_t s = 0; s < size; ++s) {
      const std::int32_t from = first_drafted(s), count = draft_length(s);
      std::copy_n(drafted.data() + from, count, drafted.data() + at);
      if (at != from)
        std::copy_n(probabilities.data() + std::ptrdiff_t{from} * vocab, std::ptrdiff_t{count} * vocab,
                    probabilities.data() + std::ptrdiff_t{at} * vocab);
      judged_offsets.data()[s] = at + s;
      at += count;
    }
    judged_offsets.data()[size] = at + size;
  }
  std::int32_t most_steps() const {
    return size == 0 ? 0 : *std::max_element(draft_steps.data(), draft_steps.data() + size);
  }

  std::int32_t size = 0;
  buffer<std::int32_t, cpu> rows;            ///< [sequences] cache rows
  buffer<std::int32_t, cpu> draft_lengths;   ///< [sequences] γ of this round
  buffer<std::int32_t, cpu> draft_steps;     ///< [sequences] γ, and one more where its last token's attention guides
  buffer<std::int32_t, cpu> judged_offsets;  ///< [sequences + 1] slots whose logits are wanted: γ + 1 each
  buffer<std::int32_t, cpu> drafted;         ///< drafted tokens, a sequence's from first_drafted(s)
  buffer<float, cpu> probabilities;          ///< [drafted, vocab] what they were drawn from
  buffer<std::uint8_t, cpu> failed;          ///< [sequences] 1: the draft failed for it
  buffer<decode_counts, cpu> draft_counts;   ///< [sequences] what its draft steps read
  std::span<const std::int32_t> forced;      ///< score(): the text that is drafted and accepted; empty: none
};

/// Rows a verify pass of `slots` slots read for one sequence, and rows a dense pass would have read.
template <storage T, backend B>
decode_counts rows_read(const round_state<T, B>& state, std::int32_t s, std::int32_t slots,
                        std::int64_t metadata_rows) {
  const std::int32_t kv_len = state.kv_lens[static_cast<std::size_t>(s)];
  decode_counts counts;
  counts.dense_rounds = 1;
  for (std::int32_t layer = 0; layer < state.layers; ++layer) {
    for (std::int32_t h = 0; h < state.kv_heads; ++h) {
      const std::int32_t count = state.kept.counts[state.group(layer, s, h)];
      if (count != keep_all) counts.dense_rounds = 0;
      counts.kv_rows_read += (count == keep_all ? kv_len : count + metadata_rows) + slots;
    }
  }
  counts.kv_rows_dense = std::int64_t{state.layers} * state.kv_heads * (kv_len + slots);
  counts.refreshed = state.replayed[static_cast<std::size_t>(s)] > 0;
  return counts;
}

/// -log p (natural) of a token under a row of logits.
inline float token_loss(const float* logits, std::int32_t vocab, std::int32_t token) {
  const float max = *std::max_element(logits, logits + vocab);
  double sum = 0.0;
  for (std::int32_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(logits[v] - max));
  return static_cast<float>(std::log(sum) + static_cast<double>(max) - static_cast<double>(logits[token]));
}

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
