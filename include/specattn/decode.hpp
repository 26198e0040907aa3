// The loop: draft, guide, verify, accept, roll back, for a batch of sequences that join and leave between rounds.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>

#include "decode_calls.hpp"
#include "decode_memory.hpp"
#include "decode_options.hpp"
#include "decode_round.hpp"
#include "decode_state.hpp"
#include "drafter.hpp"
#include "guide.hpp"
#include "kv_cache.hpp"
#include "model.hpp"
#include "sequence_table.hpp"
#include "verifier.hpp"

namespace specattn::inline v0_1 {

/// Stands for a draft model where there is none: plain decoding, draft_length 0.
struct no_draft {
  model_shape shape() const { return {}; }
  template <class Context, class Batch, class Attention, class Logits>
  void forward(Context&, const Batch&, Attention&, Logits) {}
};

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
/// Keys and values are stored as `T`. All memory is taken in the constructor (see decoder_bytes()), none in a round;
/// the context's workspace is grown there once. Not thread-safe: one caller at a time.
template <storage T, class Target, class Draft, class Guide, backend B = cpu>
  requires language_model<Target, B> && language_model<Draft, B> && guide<Guide, T, B>
class decoder {
 public:
  /// \throws contract_error for models that do not fit each other or the options; the message names the values
  decoder(context<B>& ctx, Target& target, Draft& draft, Guide& guide, const decode_options& options)
      : ctx_(&ctx), guide_(guide), options_(options), shape_(target.shape()) {
    sizes_ = detail::decode_sizes(shape_, draft.shape(), options_);
    detail::check_decode(shape_, draft.shape(), options_, sizes_);
    options_.prefill_chunk = (std::min)(options_.prefill_chunk, shape_.max_slots);
    if (options_.draft_length > 0) {
      options_.prefill_chunk = (std::min)(options_.prefill_chunk, draft.shape().max_slots);
    }
    needs_ = guide_.needs();
    pace_ = detail::round_pace(options_, sizes_, !std::same_as<Guide, no_guide>);
    verifier_.emplace(ctx, target, options_, sizes_, needs_);
    if (options_.draft_length > 0) drafter_.emplace(ctx, draft, options_, sizes_, needs_.draft_weights);
    sequences_ = detail::sequence_table(sizes_, shape_.vocab, options_.draft_length);
    batch_ = detail::round_batch(sizes_, shape_.vocab);
    turns_ = detail::recording_turns(sizes_.sequences);
    delivery_ = detail::token_delivery(sizes_.sequences);
    guide_.prepare({shape_, options_.draft_length > 0 ? draft.shape() : model_shape{}, sizes_.sequences,
                    sizes_.positions, sizes_.verify_slots, sizes_.recorded_rows});
    std::size_t need = (std::max)(verifier_->workspace_bytes(ctx), guide_.workspace_bytes(ctx));
    if (drafter_) need = (std::max)(need, drafter_->workspace_bytes(ctx, sizes_.sequences));
    ctx_->reserve_workspace(need);
  }

  /// Admits a sequence and prefills its prompt (both models, dense). Returns its row, which identifies it until
  /// remove(). `progress(done, total)` is called after each chunk; what it throws cancels.
  /// \throws contract_error when no row is free, the prompt is empty, too long, or holds a token outside the vocab
  template <class Progress>
  std::int32_t add(const decode_request& request, Progress&& progress) {
    const auto busy = calls_.enter("add()", true);
    return admit(request, progress, false);
  }
  std::int32_t add(const decode_request& request) {
    return add(request, [](std::int32_t, std::int32_t) {});
  }

  /// Starts a row over from the prompt it was admitted with, under another request (whose prompt is not read): what
  /// came behind the prompt is rolled back, nothing is prefilled again.
  void rewind(std::int32_t row, const decode_request& request) {
    const auto busy = calls_.enter("rewind()", true);
    sequences_.rewind(row, request);
    turns_.begin_anew();
    roll_back(row, sequences_.at(row).prompt_length - 1);
    guide_.forget(row);
  }

  /// Runs one round for every running sequence. `on_tokens(row, tokens)` receives what each sequence emitted (valid until it
  /// returns, or removes the row) and returns false to cancel it. Returns whether a sequence is running.
  template <class OnTokens>
  bool step(OnTokens&& on_tokens) {
    const auto busy = calls_.enter("step()", false);
    gather_batch();
    if (batch_.size == 0) return false;
    run_round();
    commit();
    pace_.learn(trace_);
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
  decode_counts score(std::span<const std::int32_t> tokens, std::int32_t prefill, std::span<float> loss) {
    detail::check_tokens(tokens, "score: the text", sizes_.positions, shape_.vocab);
    const auto length = static_cast<std::int32_t>(tokens.size());
    detail::expects(prefill >= 1 && prefill < length, "score: prefill ", prefill, " is outside 1 … ", length - 1);
    detail::expects(static_cast<std::int32_t>(loss.size()) == length - prefill, "score: ", loss.size(),
                    " losses for ", length - prefill, " tokens");
    detail::expects(!sequences_.any_active(), "score: the decoder must have no running sequence");
    const auto no_progress = [](std::int32_t, std::int32_t) {};
    const std::int32_t row = [&] {
      const auto busy = calls_.enter("score()", false);
      return admit({.prompt = tokens.first(static_cast<std::size_t>(prefill)), .max_new_tokens = length - prefill},
                   no_progress, true);
    }();
    const detail::undo_scope end_of_text([&] {
      batch_.forced = {};
      loss_ = {};
      release(row);
    });
    batch_.forced = tokens;
    loss_ = loss;
    while (step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
    }
    return sequences_.at(row).counts;
  }

  std::span<const std::int32_t> text(std::int32_t row) const { return sequences_.at(row).text; }
  finish_reason finish(std::int32_t row) const { return sequences_.at(row).finish; }
  const decode_counts& counts(std::int32_t row) const { return sequences_.at(row).counts; }
  const round_trace& last_round() const { return trace_; }
  const decode_options& options() const { return options_; }
  /// What adaptive rounds have learnt of costs; null where the options are not adaptive.
  const round_planner* planner() const { return pace_.planner(); }
  /// What the draft threw last; null: it never did.
  std::exception_ptr draft_failure() const { return drafter_ ? drafter_->failure() : nullptr; }
  const kv_cache<T, B>& target_cache() const { return verifier_->cache(); }
  /// \pre there is a draft
  const kv_cache<T, B>& draft_cache() const { return drafter_->cache(); }

 private:
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  static double lap(double& mark) {
    const double before = mark;
    mark = now();
    return mark - before;
  }

  detail::sequence_state& in_batch(std::int32_t s) { return sequences_.at(batch_.rows.data()[s]); }

  /// Both caches to `cached` positions of a row, or what they hold of them; pages reserved beyond return.
  void roll_back(std::int32_t row, std::int32_t cached) {
    const auto cut = [&](kv_cache<T, B>& cache) { cache.roll_back(row, (std::min)(cache.length(row), cached)); };
    cut(verifier_->cache());
    if (drafter_) cut(drafter_->cache());
  }
  void release(std::int32_t row) {
    verifier_->cache().clear(row);
    if (drafter_) drafter_->cache().clear(row);
    guide_.forget(row);
    sequences_.free_row(row);
  }

  /// \param strict a draft that throws ends it; else the draft catches up later
  template <class Progress>
  std::int32_t admit(const decode_request& request, Progress& progress, bool strict) {
    const std::int32_t row = sequences_.take_row(request);
    detail::undo_scope undo([&] { release(row); });
    const auto length = static_cast<std::int32_t>(request.prompt.size());
    bool drafted = drafter_.has_value();
    for (std::int32_t from = 0; from < length - 1; from += options_.prefill_chunk) {
      const std::int32_t to = (std::min)(from + options_.prefill_chunk, length - 1);
      verifier_->prefill(row, sequences_.at(row).text, to);
      const std::int32_t reach = drafted ? (std::min)(to, sizes_.draft_cache.max_positions) : 0;
      if (from < reach) {
        const auto thrown = detail::attempt([&] { drafter_->prefill(row, sequences_.at(row).text, reach); });
        if (thrown && strict) std::rethrow_exception(thrown);
        if (thrown) drafter_->note_failure(thrown);
        drafted = !thrown;
      }
      progress(to, length - 1);
    }
    sequences_.at(row).active = true;
    turns_.begin_anew();
    undo.dismiss();
    return row;
  }

  /// Drafts, guides and verifies. A round that throws has not been: both caches hold what they held, and nothing else of a
  /// text was touched.
  void run_round() {
    detail::undo_scope undo([&] {
      for (std::int32_t s = 0; s < batch_.size; ++s)
        roll_back(batch_.rows.data()[s], static_cast<std::int32_t>(in_batch(s).text.size()) - 1);
    });
    sparse_ = pace_.choose(batch_, sequences_);
    trace_ = {};
    trace_.sequences = batch_.size;
    double mark = now();
    const std::span<const std::int32_t> rows(batch_.rows.data(), static_cast<std::size_t>(batch_.size));
    reuse_ = batch_.longest_draft() > 0 && ((needs_.draft_weights && sparse_) || options_.sparse_draft) &&
             turns_.may_reuse(options_.record_every, rows, sparse_);
    batch_.begin_drafts();
    if (drafter_) drafter_->run(batch_, sequences_, turns_.may_continue(rows), reuse_);
    if (!batch_.forced.empty() && batch_.any_failed()) std::rethrow_exception(drafter_->failure());
    trace_.draft_seconds = lap(mark);
    verifier_->lay_out(batch_, sequences_, sparse_);
    verifier_->choose_rows(guide_, batch_, drafter_ ? &*drafter_ : nullptr, reuse_ && needs_.draft_weights);
    trace_.guide_seconds = lap(mark);
    verifier_->run(guide_, batch_);
    trace_.verify_seconds = lap(mark);
    if (batch_.forced.empty())
      verifier_->judge(batch_, sequences_);
    else
      verifier_->judge_forced(batch_, in_batch(0), loss_);
    trace_.accept_seconds = lap(mark);
    guide_.after_verify(*ctx_, verifier_->state());
    trace_.guide_seconds += lap(mark);
    undo.dismiss();
  }

  /// Takes the round over, for every sequence whose logits could be judged.
  void commit() {
    double mark = now();
    const round_state<T, B>& state = verifier_->state();
    turns_.take(state.cache_rows, batch_.longest_draft() > 0, sparse_, verifier_->any_dense(), reuse_);
    if (batch_.any_failed()) turns_.begin_anew();
    if (drafter_) drafter_->select_own(batch_);
    trace_.draft_seconds += lap(mark);
    delivery_.clear();
    failed_row_ = -1;
    for (std::int32_t s = 0; s < batch_.size; ++s) {
      const std::int32_t row = batch_.rows.data()[s], accepted = state.accepted[static_cast<std::size_t>(s)];
      detail::sequence_state& seq = in_batch(s);
      const auto before = static_cast<std::int32_t>(seq.text.size());
      if (accepted >= 0) {
        trace_.counts +=
            detail::commit_round(seq, batch_.drafted_of(s), accepted, verifier_->next_token(s), rows_of(s),
                                 state.kv_lens[static_cast<std::size_t>(s)], verifier_->slots_of(s));
        delivery_.note(row, seq, before);
      } else if (failed_row_ < 0) {
        failed_row_ = row;
        failed_position_ = before;
      }
      roll_back(row, static_cast<std::int32_t>(seq.text.size()) - 1);
    }
    trace_.accept_seconds += lap(mark);
  }

  /// What the round read for one sequence.
  decode_counts rows_of(std::int32_t s) const {
    const round_state<T, B>& state = verifier_->state();
    const std::int32_t kv_len = state.kv_lens[static_cast<std::size_t>(s)];
    decode_counts rows = detail::rows_read(state, s, verifier_->slots_of(s), guide_.metadata_rows(kv_len));
    rows += batch_.draft_counts.data()[s];
    rows.reused_rounds = reuse_ && (rows.dense_rounds == 0 || options_.sparse_draft) ? 1 : 0;
    rows.draft_failures = batch_.failed.data()[s];
    return rows;
  }

  /// Running sequences, and how much each may draft: no further than its limit, the context and the draft's reach.
  void gather_batch() {
    batch_.size = 0;
    batch_.judged_offsets.data()[0] = 0;
    for (std::int32_t row = 0; row < sizes_.sequences; ++row) {
      if (!sequences_.runs(row)) continue;
      const detail::sequence_state& seq = sequences_.at(row);
      const auto length = static_cast<std::int32_t>(seq.text.size());
      const std::int32_t wanted = seq.max_new_tokens - (length - seq.prompt_length) - 1;
      const std::int32_t reach = sizes_.draft_cache.max_positions - length + 1;
      const std::int32_t s = batch_.size++;
      batch_.rows.data()[s] = row;
      batch_.draft_length(s) =
          (std::max)(0, (std::min)({seq.draft_length, wanted, sizes_.positions - length, drafter_ ? reach : 0}));
      batch_.judged_offsets.data()[s + 1] = batch_.judged_offsets.data()[s] + batch_.draft_length(s) + 1;
    }
  }

  context<B>* ctx_;
  detail::held_guide<Guide> guide_;
  decode_options options_;
  model_shape shape_;
  detail::decode_sizes sizes_;
  guide_needs needs_;
  std::optional<detail::verifier<T, Target, B>> verifier_;
  std::optional<detail::drafter<T, Draft, B>> drafter_;
  detail::sequence_table sequences_;
  detail::round_batch batch_;
  detail::round_pace pace_;
  detail::recording_turns turns_;
  bool sparse_ = true;  // this round's pace
  bool reuse_ = false;  // this round reads what one before has selected
  std::span<float> loss_;
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

}  // namespace specattn::inline v0_1
