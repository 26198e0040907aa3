// What a round does to one sequence: what it takes over, what it counts, and what is refused beforehand.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "cost_model.hpp"
#include "decode_options.hpp"
#include "decode_state.hpp"
#include "error.hpp"
#include "guide.hpp"
#include "sequence_table.hpp"

namespace specattn::inline v0_1::detail {

/// Appends a round's accepted drafts and the target's own token, up to a stop token or the limit; returns the counts.
/// \param drafted what was drafted for the sequence
inline decode_counts take_tokens(sequence_state& seq, std::span<const std::int32_t> drafted, std::int32_t accepted,
                                 std::int32_t next) {
  const std::size_t before = seq.text.size();
  for (std::int32_t i = 0; i <= accepted && seq.finish == finish_reason::running; ++i) {
    const std::int32_t token = i < accepted ? drafted[static_cast<std::size_t>(i)] : next;
    seq.text.push_back(token);
    if (std::find(seq.stop_tokens.begin(), seq.stop_tokens.end(), token) != seq.stop_tokens.end()) {
      seq.finish = finish_reason::stop_token;
    } else if (static_cast<std::int32_t>(seq.text.size()) - seq.prompt_length >= seq.max_new_tokens) {
      seq.finish = finish_reason::length;
    }
  }
  const auto proposed = static_cast<std::int32_t>(drafted.size());
  decode_counts counts;
  counts.rounds = 1;
  counts.proposed = proposed;
  counts.accepted = accepted;
  counts.bonus = accepted == proposed;
  counts.corrected = accepted < proposed;
  counts.emitted = static_cast<std::int64_t>(seq.text.size() - before);
  counts.discarded = accepted + 1 - counts.emitted;
  for (std::int32_t i = 0; i < accepted; ++i) ++counts.accepted_at[static_cast<std::size_t>(i)];
  return counts;
}

/// Takes a round over for one sequence, whose pass evaluated `slots` slots behind `kv_len` cached positions; returns the
/// counts. Does not throw.
inline decode_counts commit_round(sequence_state& seq, std::span<const std::int32_t> drafted, std::int32_t accepted,
                                  std::int32_t next, const decode_counts& rows, std::int32_t kv_len,
                                  std::int32_t slots) {
  decode_counts counts = take_tokens(seq, drafted, accepted, next);
  counts += rows;
  seq.counts += counts;
  if (rows.dense_rounds > 0 && kv_len <= seq.exact_length) seq.exact_length = kv_len + slots;
  seq.exact_length = (std::min)(seq.exact_length, static_cast<std::int32_t>(seq.text.size()) - 1);
  seq.rounds_since_refresh = rows.refreshed > 0 ? 0 : seq.rounds_since_refresh + 1;
  return counts;
}

/// Whose turn it is to record, and whose to reuse what a round before has selected (decode_options::record_every).
class recording_turns {
 public:
  recording_turns() = default;
  explicit recording_turns(std::int32_t sequences) { rows_.reserve(static_cast<std::size_t>(sequences)); }

  /// Some sequence is not the one it was: the next round records, and no list is of use to it.
  void begin_anew() {
    rounds_ = 0;
    recorded_ = false;
  }
  /// Whether the draft has lists of these cache rows, from whatever round recorded last.
  bool may_continue(std::span<const std::int32_t> rows) const {
    return recorded_ && std::equal(rows.begin(), rows.end(), rows_.begin(), rows_.end());
  }
  /// Whether a round of these cache rows may read what the last recording one selected.
  bool may_reuse(std::int32_t every, std::span<const std::int32_t> rows, bool sparse) const {
    return rounds_ > 0 && rounds_ < every && (sparse_ || !sparse) && may_continue(rows);
  }
  /// Notes a round; one that drafted nothing leaves lists as they were, and the next one records.
  /// \param any_dense some sequence read everything, so that what was selected says nothing of it
  void take(std::span<const std::int32_t> rows, bool drafted, bool sparse, bool any_dense, bool reused) {
    if (drafted && !reused) {
      rows_.assign(rows.begin(), rows.end());
      sparse_ = sparse;
      recorded_ = true;
      rounds_ = 0;
    }
    rounds_ = any_dense || !drafted ? 0 : rounds_ + 1;
  }

 private:
  std::vector<std::int32_t> rows_;  // of the last round that recorded
  std::int32_t rounds_ = 0;         // it and those behind it; 0: the next one records
  bool sparse_ = false;             // whether the target's lists were made, too
  bool recorded_ = false;           // since the last begin_anew()
};

/// Decides how a round runs: as the options say, or, where they are adaptive, as the rounds before suggest.
class round_pace {
 public:
  round_pace() = default;
  round_pace(const decode_options& options, const decode_sizes& sizes, bool may_be_sparse) {
    if (!options.adaptive || options.draft_length == 0) return;
    planner_.emplace(double(sizes.target_cache.layers) * sizes.target_cache.kv_heads,
                     double(sizes.draft_cache.layers) * sizes.draft_cache.kv_heads, options.draft_length,
                     may_be_sparse);
  }

  /// Shortens the batch's drafts. Returns whether the round may be sparse.
  bool choose(round_batch& batch, const sequence_table& sequences) {
    if (!planner_) return true;
    double cached = 0.0;
    for (std::int32_t s = 0; s < batch.size; ++s)
      cached += static_cast<double>(sequences.at(batch.rows.data()[s]).text.size());
    kv_len_ = cached / batch.size;
    const round_setting setting = planner_->choose(batch.size, kv_len_);
    for (std::int32_t s = 0; s < batch.size; ++s) {
      batch.draft_length(s) = (std::min)(batch.draft_length(s), setting.draft_length);
      batch.judged_offsets.data()[s + 1] = batch.judged_offsets.data()[s] + batch.draft_length(s) + 1;
    }
    return setting.sparse;
  }
  void learn(const round_trace& trace) {
    if (planner_) planner_->learn(trace, kv_len_);
  }
  /// Null where the options are not adaptive.
  const round_planner* planner() const { return planner_ ? &*planner_ : nullptr; }

 private:
  std::optional<round_planner> planner_;
  double kv_len_ = 0.0;
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
  return static_cast<float>(std::log(sum) + max - logits[token]);
}

}  // namespace specattn::inline v0_1::detail
