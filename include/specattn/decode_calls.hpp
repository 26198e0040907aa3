// What a decoder does when its caller's functions call it back, or throw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <utility>
#include <vector>

#include "error.hpp"
#include "sequence_table.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Which of a decoder's calls is under way. on_tokens may change who runs; nothing else of the caller's may.
class call_guard {
  enum class activity { none, call, delivery };

 public:
  /// For as long as it lives, the decoder is busy.
  class scope {
   public:
    scope(activity& of, activity now) : of_(&of), before_(std::exchange(of, now)) {}
    scope(const scope&) = delete;
    scope& operator=(const scope&) = delete;
    ~scope() { *of_ = before_; }

   private:
    activity* of_;
    activity before_;
  };

  /// \param name of the call, for the message
  scope enter(const char* name, bool from_on_tokens) {
    expects(now_ == activity::none || (from_on_tokens && now_ == activity::delivery), "decode: ", name,
            now_ == activity::delivery
                ? " was called from inside on_tokens; let step() return first"
                : " was called while another call of this decoder runs (from a model, a guide or progress)");
    return {now_, activity::call};
  }
  /// While on_tokens is called. \pre inside enter()
  scope deliver() { return {now_, activity::delivery}; }

 private:
  activity now_ = activity::none;
};

/// The tokens that a round emitted, for on_tokens: called once for each sequence when the whole round is taken over.
class token_delivery {
 public:
  explicit token_delivery(std::int32_t sequences) { emissions_.reserve(static_cast<std::size_t>(sequences)); }

  void clear() { emissions_.clear(); }
  /// \param before tokens of the row's text that are not new
  void note(std::int32_t row, const sequence_state& seq, std::int32_t before) {
    emissions_.push_back({row, before, static_cast<std::int32_t>(seq.text.size()) - before, seq.ticket});
  }

  /// Calls on_tokens for every row that still holds the text it was noted with. Returns the first exception, or null; the
  /// others are called all the same.
  template <class OnTokens>
  std::exception_ptr deliver(sequence_table& sequences, OnTokens& on_tokens) const {
    std::exception_ptr first;
    for (const emission& e : emissions_) {
      const auto is_same = [&] {
        const sequence_state& seq = sequences.at(e.row);
        return seq.active && seq.ticket == e.ticket;
      };
      if (!is_same()) continue;
      const std::span<const std::int32_t> tokens(sequences.at(e.row).text.data() + e.first,
                                                 static_cast<std::size_t>(e.count));
      bool goes_on = true;
      const auto thrown = attempt([&] { goes_on = on_tokens(e.row, tokens); });
      if (thrown && !first) first = thrown;
      if (goes_on || !is_same()) continue;
      sequence_state& seq = sequences.at(e.row);
      if (seq.finish == finish_reason::running) seq.finish = finish_reason::cancelled;
    }
    return first;
  }

 private:
  struct emission {
    std::int32_t row, first, count;
    std::uint64_t ticket;
  };

  std::vector<emission> emissions_;
};

/// Ends a step(): what a callback threw, else the sequence whose logits could not be judged.
/// \param failed_row negative: none
inline void raise_failures(const std::exception_ptr& thrown, std::int32_t failed_row, std::int32_t position) {
  if (thrown) std::rethrow_exception(thrown);
  expects(failed_row < 0, "decode: the target's logits for position ", position, " of row ", failed_row,
          " hold no finite value; the row is as it was before the round: try again, or remove() it");
}

}  // namespace specattn::inline SPECATTN_CODE::detail
