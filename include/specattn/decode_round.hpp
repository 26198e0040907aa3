// What a round does to one sequence: the tokens it appends and what it counts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "decode_options.hpp"
#include "decode_state.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

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

/// Takes a round over for one sequence, whose pass evaluated `slots` slots after `kv_len` cached positions; returns the
/// counts. Does not throw.
inline decode_counts commit_round(sequence_state& seq, std::span<const std::int32_t> drafted, std::int32_t accepted,
                                  std::int32_t next, const decode_counts& rows, std::int32_t kv_len,
                                  std::int32_t slots) {
  decode_counts counts = take_tokens(seq, drafted, accepted, next);
  counts += rows;
  seq.counts += counts;
  if (rows.dense_rounds > 0 && kv_len <= seq.exact_length) seq.exact_length = kv_len + slots;
  seq.exact_length = (std::min)(seq.exact_length, static_cast<std::int32_t>(seq.text.size()) - 1);
  seq.refreshed = false;
  seq.rounds_since_refresh = rows.refreshed > 0 ? 0 : seq.rounds_since_refresh + 1;
  return counts;
}

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "words_end.hpp"
