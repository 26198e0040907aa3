// What a decoding run is asked for, and what it counts.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "select.hpp"
#include "verify.hpp"

namespace specattn::inline SPECATTN_DATA {

/// The most tokens a round may draft.
inline constexpr std::int32_t max_draft_length = 15;

/// How rounds run. Verification over a selection is approximate; with no_guide, or top_p >= 1, it is exact.
struct decode_options {
  std::int32_t draft_length = 4;   ///< γ: tokens drafted a round, 0 … max_draft_length; 0 decodes plainly
  std::int32_t max_sequences = 1;  ///< sequences that can run at once
  std::int32_t max_positions = 0;  ///< positions a sequence can reach; 0: the target's limit
  std::int32_t min_context = 0;    ///< below this many cached positions a round is dense
  std::int32_t dense_layers = 0;   ///< the first target layers that always stay dense
  std::int32_t refresh_every = 0;  ///< every n rounds, rewrite the keys and values since the last exact one; 0: never
  /// Draft steps whose weights guide the round: one for each slot of the verify pass, the last drafted token's included,
  /// on which the draft runs for that alone. 0: all draft_length + 1. A step left out costs more than the guide itself on a
  /// model of sharp heads (SmolLM2-135M: 1.0 % of perplexity with all five slots, 3.0 with four, 13 with one).
  std::int32_t record_steps = 0;
  /// Record the draft's weights and select, for the target and for a sparse draft, in one round of n; the other n - 1
  /// reuse the lists, extended by the positions appended since. A round records anyway when its sequences are not those of
  /// the round before, or when one of them was dense then.
  std::int32_t record_every = 1;
  /// Each round drafts 1 … draft_length tokens and verifies densely or sparsely, whichever the costs of the rounds
  /// before predict to be fastest (cost_model.hpp). With a sparse verify pass the text then depends on the clock.
  bool adaptive = false;
  /// Draft steps attend over the draft's own selection, made from the last recording and grown since; a round records by
  /// one more reading of the draft's keys, for all its steps. The first round of a batch drafts densely.
  bool sparse_draft = false;
  selection_rule draft_rule = {.top_p = 0.95f, .rows = combine::mean};  ///< of the sparse draft
  std::int32_t prefill_chunk = 256;  ///< slots of a prefill pass; cut to the models' max_slots
  std::int32_t page_size = 0;        ///< of both caches; 0: contiguous
};

/// One text to continue.
struct decode_request {
  std::span<const std::int32_t> prompt{};  ///< at least one token
  std::int32_t max_new_tokens = 256;
  std::int32_t draft_length = -1;  ///< of this sequence, at most the options'; -1: the options'; 0: plain decoding
  std::span<const std::int32_t> stop_tokens{};  ///< the first of them to appear is the last token emitted
  sampler_options sampler{};
};

enum class finish_reason { running, stop_token, length, context_full, cancelled };

/// Counts, never rates: divide where the denominator is known not to be zero.
struct decode_counts {
  std::int64_t rounds = 0;         ///< rounds a sequence took part in = its verify passes
  std::int64_t dense_rounds = 0;   ///< of them, rounds that read everything (min_context, refresh, no draft)
  std::int64_t reused_rounds = 0;  ///< of them, rounds that read what a round before had selected (record_every)
  std::int64_t refreshed = 0;      ///< of them, rounds that rewrote approximate keys and values
  std::int64_t draft_failures =
      0;                      ///< of them, rounds that lost drafted tokens: the draft threw, or its logits held NaN
  std::int64_t proposed = 0;  ///< drafted tokens that were verified
  std::int64_t draft_steps = 0;  ///< slots of the draft's passes that were asked for: one a token, and one more where
                                 ///< the last token's attention guided
  std::int64_t accepted = 0;
  std::int64_t corrected = 0;  ///< rounds that ended in a correction
  std::int64_t bonus = 0;      ///< rounds whose drafts were all accepted
  std::int64_t emitted = 0;
  std::int64_t discarded = 0;      ///< decided tokens after a stop or the limit
  std::int64_t kv_rows_read = 0;   ///< rows (one position's K and V of one layer and kv head) the verify passes read
  std::int64_t kv_rows_dense = 0;  ///< rows that dense passes would have read
  std::int64_t draft_rows_read = 0;
  std::int64_t draft_rows_dense = 0;
  std::array<std::int64_t, max_draft_length> accepted_at{};  ///< rounds that accepted the i-th drafted token

  [[gnu::always_inline]] decode_counts& operator+=(const decode_counts& other) {
    rounds += other.rounds;
    dense_rounds += other.dense_rounds;
    reused_rounds += other.reused_rounds;
    refreshed += other.refreshed;
    draft_failures += other.draft_failures;
    proposed += other.proposed;
    draft_steps += other.draft_steps;
    accepted += other.accepted;
    corrected += other.corrected;
    bonus += other.bonus;
    emitted += other.emitted;
    discarded += other.discarded;
    kv_rows_read += other.kv_rows_read;
    kv_rows_dense += other.kv_rows_dense;
    draft_rows_read += other.draft_rows_read;
    draft_rows_dense += other.draft_rows_dense;
    for (std::size_t i = 0; i < accepted_at.size(); ++i) accepted_at[i] += other.accepted_at[i];
    return *this;
  }
};

/// What one round did, over the whole batch. Seconds are wall-clock.
struct round_trace {
  std::int32_t sequences = 0;
  decode_counts counts;
  double draft_seconds = 0;   ///< draft passes, their sampling and the draft's own selection
  double guide_seconds = 0;   ///< importance and selection, history included
  double verify_seconds = 0;  ///< the target's pass (with what a guide does inside it)
  double accept_seconds = 0;  ///< acceptance, roll-back, bookkeeping

  [[gnu::always_inline]] round_trace& operator+=(const round_trace& other) {
    sequences += other.sequences;
    counts += other.counts;
    draft_seconds += other.draft_seconds;
    guide_seconds += other.guide_seconds;
    verify_seconds += other.verify_seconds;
    accept_seconds += other.accept_seconds;
    return *this;
  }
  [[gnu::always_inline]] double seconds() const {
    return draft_seconds + guide_seconds + verify_seconds + accept_seconds;
  }
};

/// Bytes a decoder allocates, known before it is made.
struct decode_memory {
  std::size_t target_cache = 0;
  std::size_t draft_cache = 0;
  std::size_t recordings = 0;
  std::size_t selections = 0;
  std::size_t logits = 0;  ///< and the small arrays of rounds
  [[gnu::always_inline]] std::size_t total() const {
    return target_cache + draft_cache + recordings + selections + logits;
  }
};

}  // namespace specattn::inline SPECATTN_DATA
