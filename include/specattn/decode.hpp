// The loop: draft, guide, verify, accept, roll back, for a batch of sequences that join and leave between rounds.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <vector>

#include "decode_calls.hpp"
#include "decode_options.hpp"
#include "decode_plan.hpp"
#include "decode_round.hpp"
#include "decode_state.hpp"
#include "guide.hpp"
#include "kv_cache.hpp"
#include "model.hpp"
#include "sequence_table.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// Stands for a draft model where there is none: plain decoding, draft_length 0.
struct no_draft {
  model_shape shape() const { return {}; }
  template <class Context, class Batch, class Attention, class Logits>
  void forward(Context&, const Batch&, Attention&, Logits) {}
};

namespace detail {

/// What a round decided for one sequence.
struct round_result {
  std::span<const std::int32_t> drafted;  ///< that were judged
  std::int32_t accepted = 0;  ///< of them; -1: the round is void, the target's logits hold no finite value
  std::int32_t next = 0;      ///< the target's own token
  std::int32_t kv_len = 0;    ///< cached before the verify pass
  std::int32_t slots = 0;     ///< of the verify pass
  decode_counts rows;         ///< what was read
};

/// Runs rounds on a backend: owns both caches, the passes' arrays and the guide's memory, and changes nothing of a sequence
/// but its rows of the caches. The members are
///   prefill(parts), prefill_draft(parts)            caches parts of texts in one pass
///   forget(row), publish(cache)                     the row's text has ended; pages were taken outside a round
///   run(plan, sequences)                            may throw; then only cached positions after a text may have changed
///   settle(), result(s), drafts_lost(), trace()     of a round that stands
///   draft_failure(), note_draft_failure(thrown), target_cache(), draft_cache()
///   bytes(target, draft, options, sizes, needs, guided)  what it allocates
///   force(text, losses)                             rounds draft and accept `text` and leave its losses; empty: no longer
/// incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
template <storage T, class Target, class Draft, class Guide, backend B>
class round_engine;

}  // namespace detail

/// Decodes with a target, a draft and a guide that the caller owns; the decoder owns both caches, and what the guide
/// remembers of its texts: one guide may serve several decoders.
///
/// After an exception, from a call or from what the call calls (models, guide, progress, on_tokens), every sequence is what
/// it would have been without that call:
/// - add() has admitted nothing, rewind() and score() have changed nothing;
/// - step() has run no round if a model or a guide threw: call it again, or remove() a row first;
/// - a sequence whose target logits hold no finite value is as before the round, which stands for the others; step() takes
///   their tokens over, calls on_tokens for them, and then throws, naming the row: try again, or remove() it;
/// - on_tokens that throws has been called once for every other sequence too; its own tokens are in text();
/// - a draft that throws, or whose logits hold no finite value, ends nothing: from there on the round goes without its
///   tokens (decode_counts::draft_failures, draft_failure()). Only score(), which measures it, passes the exception on.
///
/// on_tokens may call add(), remove() and rewind(), and on_tokens alone: a text that was removed or rewound gets no more of
/// its round's tokens. Every other call from inside a call is refused.
///
/// On cuda (<specattn/cuda/decode.cuh>) a round is one captured graph, launched once and waited for once; see round_engine
/// there for what differs.
///
/// Keys and values are stored as `T`. All memory is taken in the constructor (see decoder_bytes()), none in a round;
/// the context's workspace is grown there once. Not thread-safe: one caller at a time.
template <storage T, class Target, class Draft, class Guide, backend B = cpu>
  requires language_model<Target, B> && language_model<Draft, B> && guide<Guide, T, B>
class decoder {
 public:
  /// \throws contract_error for models that do not fit each other or the options; the message names the values
  /// \sync   cuda: waits for the device
  decoder(context<B>& ctx, Target& target, Draft& draft, Guide& guide, const decode_options& options)
      : options_(detail::checked_options(options, target.shape(), draft.shape(), std::same_as<B, cpu>)),
        vocab_(target.shape().vocab),
        sizes_(target.shape(), draft.shape(), options_, std::same_as<B, cpu>),
        engine_(ctx, target, draft, guide, options_, sizes_),
        sequences_(sizes_, vocab_, options_.draft_length),
        policy_(options_, sizes_, guide.needs(), !std::same_as<Guide, no_guide>),
        delivery_(sizes_.sequences) {
    parts_.reserve(static_cast<std::size_t>(sizes_.sequences));
    draft_parts_.reserve(static_cast<std::size_t>(sizes_.sequences));
  }

  /// Admits a sequence and prefills its prompt (both models, dense). Returns its row, which identifies it until
  /// remove(). `progress(done, total)` is called after each chunk; what it throws cancels.
  /// \throws contract_error when no row is free, the prompt is empty, too long, or holds a token outside the vocab
  /// \sync   cuda: queued, nothing is waited for
  template <class Progress>
  std::int32_t add(const decode_request& request, Progress&& progress) {
    const auto busy = calls_.enter("add()", true);
    return admit(request, [&](std::int32_t row) { prefill(row, progress, false); });
  }
  std::int32_t add(const decode_request& request) {
    return add(request, [](std::int32_t, std::int32_t) {});
  }

  /// Admits several sequences, all or none, and returns at once: the step()s that follow cache their prompts, between the
  /// rounds of the sequences that run. Each first takes the waiting prompts through one pass of at most prefill_chunk
  /// tokens (of each model), those that came first foremost, several together where they fit; a sequence whose prompt is
  /// cached joins that step's round.
  /// \param rows out [requests]
  void add(std::span<const decode_request> requests, std::span<std::int32_t> rows) {
    const auto busy = calls_.enter("add()", true);
    detail::expects(requests.size() == rows.size(), "decode: ", requests.size(), " requests, room for ", rows.size(),
                    " rows");
    std::size_t taken = 0;
    detail::undo_scope undo([&] {
      for (std::size_t i = 0; i < taken; ++i) release(rows[i]);
    });
    for (; taken < requests.size(); ++taken) {
      rows[taken] = sequences_.take_row(requests[taken]);
      detail::sequence_state& seq = sequences_.at(rows[taken]);
      seq.active = seq.waiting = true;
    }
    undo.dismiss();
  }

  /// Admits a sequence whose prompt the caller has computed elsewhere: before the next step(), the keys and values of all
  /// its tokens but the last must stand in the returned row of target_cache() and draft_cache().
  std::int32_t add_cached(const decode_request& request) {
    const auto busy = calls_.enter("add_cached()", true);
    return admit(request, [&](std::int32_t row) {
      const auto cached = static_cast<std::int32_t>(request.prompt.size()) - 1;
      for_caches([&](kv_cache<T, B>& cache) {
        const std::int32_t count = (std::min)(cached, cache.shape().max_positions);
        cache.reserve(row, count);
        cache.advance(row, count);
        engine_.publish(cache);
      });
    });
  }

  /// Starts a row over from the prompt it was admitted with, under another request (whose prompt is not read): what
  /// came after the prompt is rolled back, nothing is prefilled again.
  void rewind(std::int32_t row, const decode_request& request) {
    const auto busy = calls_.enter("rewind()", true);
    sequences_.rewind(row, request);
    policy_.begin_anew();
    roll_back(row, sequences_.at(row).prompt_length - 1);
    engine_.forget(row);
  }

  /// Caches a chunk of the prompts that wait, then runs one round for every sequence whose prompt is cached.
  /// `on_tokens(row, tokens)` receives what each sequence emitted (valid until it returns, or removes the row) and returns
  /// false to cancel it. Returns whether a sequence is running.
  /// \sync cuda: waits for the stream
  template <class OnTokens>
  bool step(OnTokens&& on_tokens) {
    const auto busy = calls_.enter("step()", false);
    prefill_waiting();
    detail::round_plan& plan = policy_.plan(sequences_);
    if (plan.rows.empty()) return sequences_.any_running();
    run(plan);
    commit(plan);
    policy_.learn(trace_);
    const auto delivering = calls_.deliver();
    detail::raise_failures(delivery_.deliver(sequences_, on_tokens), failed_row_, failed_position_);
    return sequences_.any_running();
  }

  /// Frees a row, its cached positions and what the guide remembers of it.
  void remove(std::int32_t row) {
    const auto busy = calls_.enter("remove()", true);
    static_cast<void>(sequences_.at(row));  // refuses a row that is none
    release(row);
  }

  /// Scores a known text under the round's protocol: the first `prefill` tokens densely, the rest in rounds whose
  /// drafts are the text itself and are all accepted, so that approximate keys and values persist as in decoding.
  /// Writes -log p (natural) of every token from `prefill` on to `loss` [tokens - prefill]. No sequence may be
  /// running.
  /// \sync cuda: waits for the stream, once a round
  decode_counts score(std::span<const std::int32_t> tokens, std::int32_t prefill, std::span<float> loss) {
    detail::check_tokens(tokens, "score: the text", sizes_.positions, vocab_);
    const auto length = static_cast<std::int32_t>(tokens.size());
    detail::expects(prefill >= 1 && prefill < length, "score: prefill ", prefill, " is outside 1 … ", length - 1);
    detail::expects(static_cast<std::int32_t>(loss.size()) == length - prefill, "score: ", loss.size(),
                    " losses for ", length - prefill, " tokens");
    detail::expects(!sequences_.any_active(), "score: the decoder must have no running sequence");
    const auto no_progress = [](std::int32_t, std::int32_t) {};
    const std::int32_t row = [&] {
      const auto busy = calls_.enter("score()", false);
      return admit({.prompt = tokens.first(static_cast<std::size_t>(prefill)), .max_new_tokens = length - prefill},
                   [&](std::int32_t of) { this->prefill(of, no_progress, true); });
    }();
    const detail::undo_scope end_of_text([&] {
      engine_.force({}, {});
      release(row);
    });
    engine_.force(tokens, loss);
    while (step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
    }
    return sequences_.at(row).counts;
  }

  /// Forgets the captured rounds, as a change of the guide's rule asks for. On cuda alone.
  void recapture() requires std::same_as<B, cuda> { engine_.recapture(); }

  std::span<const std::int32_t> text(std::int32_t row) const { return sequences_.at(row).text; }
  finish_reason finish(std::int32_t row) const { return sequences_.at(row).finish; }
  /// Positions of a row's prompt that are not cached yet; 0: it takes part in rounds.
  std::int32_t waiting(std::int32_t row) const {
    const detail::sequence_state& seq = sequences_.at(row);
    return seq.waiting ? (std::max)(1, seq.prompt_length - 1 - engine_.target_cache().length(row)) : 0;
  }
  const decode_counts& counts(std::int32_t row) const { return sequences_.at(row).counts; }
  /// Of the last round. On cuda its seconds are the device's, from events between the parts of a round.
  const round_trace& last_round() const { return trace_; }
  const decode_options& options() const { return options_; }
  /// What adaptive rounds have learnt of costs; null where the options are not adaptive.
  const round_planner* planner() const { return policy_.planner(); }
  /// What the draft threw last; null: it never did.
  std::exception_ptr draft_failure() const { return engine_.draft_failure(); }
  const kv_cache<T, B>& target_cache() const { return engine_.target_cache(); }
  /// \pre there is a draft
  const kv_cache<T, B>& draft_cache() const { return *engine_.draft_cache(); }

 private:
  using engine = detail::round_engine<T, Target, Draft, Guide, B>;

  template <class Use>
  void for_caches(Use&& use) {
    use(engine_.target_cache());
    if (engine_.draft_cache() != nullptr) use(*engine_.draft_cache());
  }
  /// Both caches to `cached` positions of a row, or what they hold of them; pages reserved beyond return.
  void roll_back(std::int32_t row, std::int32_t cached) {
    for_caches([&](kv_cache<T, B>& cache) { cache.roll_back(row, (std::min)(cache.length(row), cached)); });
  }
  void release(std::int32_t row) {
    for_caches([&](kv_cache<T, B>& cache) { cache.clear(row); });
    engine_.forget(row);
    sequences_.free_row(row);
  }

  /// Takes a row and lets `fill(row)` cache its prompt; the row is free again if that throws.
  template <class Fill>
  std::int32_t admit(const decode_request& request, Fill&& fill) {
    const std::int32_t row = sequences_.take_row(request);
    detail::undo_scope undo([&] { release(row); });
    fill(row);
    sequences_.at(row).active = true;
    policy_.begin_anew();
    undo.dismiss();
    return row;
  }

  /// \param strict a draft that throws ends it; else the draft catches up later
  template <class Progress>
  void prefill(std::int32_t row, Progress& progress, bool strict) {
    const std::span<const std::int32_t> text = sequences_.at(row).text;
    const auto end = static_cast<std::int32_t>(text.size()) - 1;
    for (std::int32_t from = 0; from < end; from += options_.prefill_chunk) {
      parts_.assign({{row, text, (std::min)(from + options_.prefill_chunk, end)}});
      run_parts(strict);
      progress(parts_[0].to, end);
    }
  }

  /// A chunk of the prompts that wait, the oldest first. If the target throws, nothing of them has changed.
  void prefill_waiting() {
    parts_.clear();
    std::int32_t room = options_.prefill_chunk;
    for (std::int32_t row = sequences_.next_waiting(0); row >= 0 && room > 0;) {
      const detail::sequence_state& seq = sequences_.at(row);
      const std::int32_t from = engine_.target_cache().length(row);
      const std::int32_t to = (std::min)(from + room, seq.prompt_length - 1);
      if (to > from) parts_.push_back({row, seq.text, to});
      room -= to - from;
      row = sequences_.next_waiting(seq.ticket);
    }
    if (!parts_.empty()) run_parts(false);
    for (std::int32_t row = sequences_.next_waiting(0); row >= 0;) {
      detail::sequence_state& seq = sequences_.at(row);
      if (engine_.target_cache().length(row) == seq.prompt_length - 1) {
        seq.waiting = false;
        policy_.begin_anew();
      }
      row = sequences_.next_waiting(seq.ticket);
    }
  }

  /// Caches `parts_` in both caches; a draft that has not kept up with a row catches up when it drafts for it.
  void run_parts(bool strict) {
    draft_parts_.clear();
    for (const detail::prefill_part& part : parts_) {
      const std::int32_t from = engine_.target_cache().length(part.row);
      const std::int32_t to = (std::min)(part.to, sizes_.draft_cache.max_positions);
      if (engine_.draft_cache() != nullptr && engine_.draft_cache()->length(part.row) == from && from < to)
        draft_parts_.push_back({part.row, part.text, to});
    }
    const auto give_back = [](kv_cache<T, B>& cache, const std::vector<detail::prefill_part>& parts) {
      for (const detail::prefill_part& part : parts) cache.roll_back(part.row, cache.length(part.row));
    };
    detail::undo_scope undo([&] { give_back(engine_.target_cache(), parts_); });
    engine_.prefill(parts_);
    undo.dismiss();
    if (draft_parts_.empty()) return;
    const auto thrown = detail::attempt([&] { engine_.prefill_draft(draft_parts_); });
    if (!thrown) return;
    give_back(*engine_.draft_cache(), draft_parts_);
    if (strict) std::rethrow_exception(thrown);
    engine_.note_draft_failure(thrown);
  }

  /// A round that throws has not been: the caches hold no more than the texts, and nothing else of a text was touched.
  void run(detail::round_plan& plan) {
    detail::undo_scope undo([&] {
      for (const detail::planned_row& planned : plan.rows) roll_back(planned.row, cached_of(planned.row));
    });
    engine_.run(plan, sequences_);
    undo.dismiss();
  }

  /// Takes the round over, for every sequence whose logits could be judged.
  void commit(const detail::round_plan& plan) {
    policy_.take(plan, engine_.drafts_lost());
    engine_.settle();
    trace_ = engine_.trace();
    trace_.sequences = plan.size();
    delivery_.clear();
    failed_row_ = -1;
    for (std::int32_t s = 0; s < plan.size(); ++s) {
      const std::int32_t row = plan.rows[static_cast<std::size_t>(s)].row;
      detail::sequence_state& seq = sequences_.at(row);
      const auto before = static_cast<std::int32_t>(seq.text.size());
      const detail::round_result result = engine_.result(s);
      if (result.accepted >= 0) {
        trace_.counts += detail::commit_round(seq, result.drafted, result.accepted, result.next, result.rows,
                                              result.kv_len, result.slots);
        if (plan.sparse) seq.fresh = false;
        delivery_.note(row, seq, before);
      } else if (failed_row_ < 0) {
        failed_row_ = row;
        failed_position_ = before;
      }
      roll_back(row, cached_of(row));
    }
  }

  /// Between rounds all of a text is cached but its last token.
  std::int32_t cached_of(std::int32_t row) const {
    return static_cast<std::int32_t>(sequences_.at(row).text.size()) - 1;
  }

  decode_options options_;
  std::int32_t vocab_;
  detail::decode_sizes sizes_;
  engine engine_;
  detail::sequence_table sequences_;
  detail::round_policy policy_;
  std::vector<detail::prefill_part> parts_, draft_parts_;  // of the prefill pass that runs
  round_trace trace_;
  detail::call_guard calls_;
  detail::token_delivery delivery_;
  std::int32_t failed_row_ = -1;  // whose logits could not be judged, and at which position
  std::int32_t failed_position_ = 0;
};

/// make_decoder<fp16>(ctx, target, draft, guide, options): a decoder over keys and values stored as fp16.
template <storage T, class Target, class Draft, class Guide, backend B>
decoder<T, Target, Draft, Guide, B> make_decoder(context<B>& ctx, Target& target, Draft& draft, Guide& guide,
                                                 const decode_options& options) {
  return decoder<T, Target, Draft, Guide, B>(ctx, target, draft, guide, options);
}

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
