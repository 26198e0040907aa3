// The sequences of a decoder: who runs in which row, and what is refused at the door.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "decode_options.hpp"
#include "decode_state.hpp"
#include "error.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

inline void check_tokens(std::span<const std::int32_t> tokens, const char* what, std::int32_t positions,
                         std::int32_t vocab) {
  expects(!tokens.empty(), what, " is empty; give at least one token");
  expects(tokens.size() <= static_cast<std::size_t>(positions), what, " has ", tokens.size(),
          " tokens, the context holds ", positions);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    expects(tokens[i] >= 0 && tokens[i] < vocab, what, " has token ", tokens[i], " at ", i, ", outside a vocab of ",
            vocab);
  }
}

/// Rows of the caches and the texts in them. All memory is taken in the constructor.
class sequence_table {
 public:
  sequence_table() = default;
  sequence_table(const decode_sizes& sizes, std::int32_t vocab, std::int32_t draft_length)
      : positions_(sizes.positions),
        vocab_(vocab),
        draft_length_(draft_length),
        rows_(static_cast<std::size_t>(sizes.sequences)) {
    for (sequence_state& seq : rows_) {
      seq.text.reserve(static_cast<std::size_t>(positions_) + max_draft_length + 2);
    }
  }

  std::int32_t size() const { return static_cast<std::int32_t>(rows_.size()); }
  std::int32_t positions() const { return positions_; }
  std::int32_t vocab() const { return vocab_; }

  const sequence_state& at(std::int32_t row) const {
    expects(row >= 0 && row < size(), "decode: row ", row, " is outside 0 … ", size() - 1);
    return rows_[static_cast<std::size_t>(row)];
  }
  sequence_state& at(std::int32_t row) { return const_cast<sequence_state&>(std::as_const(*this).at(row)); }

  /// A free row, its text the prompt. It stays inactive until what the prompt caches is cached.
  std::int32_t take_row(const decode_request& request) {
    check_tokens(request.prompt, "decode: the prompt", positions_, vocab_);
    check(request);
    std::int32_t row = 0;
    while (row < size() && rows_[static_cast<std::size_t>(row)].active) ++row;
    expects(row < size(), "decode: all ", size(), " rows are taken; remove() one first");
    sequence_state& seq = at(row);
    seq.text.assign(request.prompt.begin(), request.prompt.end());
    seq.prompt_length = static_cast<std::int32_t>(request.prompt.size());
    seq.waiting = false;
    begin(seq, request);
    return row;
  }

  /// The row's text is its prompt again, under another request. A request that is refused changes nothing.
  void rewind(std::int32_t row, const decode_request& request) {
    sequence_state& seq = at(row);
    check(request);
    expects(seq.active, "decode: row ", row, " holds no sequence to rewind");
    seq.text.resize(static_cast<std::size_t>(seq.prompt_length));
    begin(seq, request);
  }

  void free_row(std::int32_t row) {
    sequence_state& seq = at(row);
    seq.active = seq.waiting = false;
    seq.text.clear();
    seq.ticket = ++tickets_;
  }

  bool any_active() const {
    return std::any_of(rows_.begin(), rows_.end(), [](const sequence_state& seq) { return seq.active; });
  }

  /// Whether some sequence can go on.
  bool any_running() const {
    return std::any_of(rows_.begin(), rows_.end(),
                       [](const sequence_state& seq) { return seq.active && seq.finish == finish_reason::running; });
  }

  /// The row that waits longest for its prompt to be cached, of those that came after `ticket`; -1: none does.
  std::int32_t next_waiting(std::uint64_t ticket) const {
    std::int32_t next = -1;
    for (std::int32_t row = 0; row < size(); ++row) {
      const sequence_state& seq = at(row);
      if (!seq.waiting || seq.finish != finish_reason::running || seq.ticket <= ticket) continue;
      if (next < 0 || seq.ticket < at(next).ticket) next = row;
    }
    return next;
  }

  /// Whether a row takes part in the next round. One whose last token no longer fits the cache ends here.
  bool runs(std::int32_t row) {
    sequence_state& seq = at(row);
    if (!seq.active || seq.waiting || seq.finish != finish_reason::running) return false;
    if (static_cast<std::int32_t>(seq.text.size()) > positions_) seq.finish = finish_reason::context_full;
    return seq.finish == finish_reason::running;
  }

 private:
  void check(const decode_request& request) const {
    expects(request.draft_length <= draft_length_, "decode: a request's draft_length ", request.draft_length,
            " is over the options' ", draft_length_);
  }
  void begin(sequence_state& seq, const decode_request& request) {
    seq.ticket = ++tickets_;
    seq.stop_tokens.assign(request.stop_tokens.begin(), request.stop_tokens.end());
    seq.max_new_tokens = request.max_new_tokens;
    seq.draft_length = request.draft_length < 0 ? draft_length_ : request.draft_length;
    seq.sampler = request.sampler;
    seq.rounds_since_refresh = 0;
    seq.refreshed = false;
    seq.fresh = true;
    seq.exact_length = seq.prompt_length - 1;
    seq.counts = {};
    seq.finish = request.max_new_tokens > 0 ? finish_reason::running : finish_reason::length;
  }

  std::int32_t positions_ = 0;
  std::int32_t vocab_ = 0;
  std::int32_t draft_length_ = 0;
  std::uint64_t tickets_ = 0;  // the newest
  std::vector<sequence_state> rows_;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "words_end.hpp"
