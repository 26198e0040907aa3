// The loop: draft, guide, verify, accept, roll back, for a batch of sequences that join and leave between rounds.
#pragma once

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "attention_pass.hpp"
#include "decode_memory.hpp"
#include "decode_options.hpp"
#include "decode_round.hpp"
#include "decode_state.hpp"
#include "drafter.hpp"
#include "guide.hpp"
#include "kept_lists.hpp"
#include "kv_cache.hpp"
#include "model.hpp"
#include "select.hpp"
#include "sequence_table.hpp"
#include "verify.hpp"

namespace specattn::inline v0_1 {

/// Stands for a draft model where there is none: plain decoding, draft_length 0.
struct no_draft {
  model_shape shape() const { return {}; }
  template <class Context, class Batch, class Attention, class Logits>
  void forward(Context&, const Batch&, Attention&, Logits) {}
};

/// Decodes with a target, a draft and a guide that the caller owns; the decoder owns both caches.
///
/// Keys and values are stored as `T`. All memory is taken in the constructor (see decoder_bytes()), none in a round;
/// the context's workspace is grown there once. Not thread-safe: one caller at a time.
template <storage T, class Target, class Draft, class Guide, backend B = cpu>
  requires language_model<Target, B> && language_model<Draft, B> && guide<Guide, T, B>
class decoder {
 public:
  /// \throws contract_error for models that do not fit each other or the options; the message names the values
  decoder(context<B>& ctx, Target& target, Draft& draft, Guide& guide, const decode_options& options)
      : ctx_(&ctx), target_(&target), guide_(&guide), options_(options), shape_(target.shape()) {
    sizes_ = detail::decode_sizes(shape_, draft.shape(), options_);
    detail::check_decode(shape_, draft.shape(), options_, sizes_);
    options_.prefill_chunk = (std::min)(options_.prefill_chunk, shape_.max_slots);
    if (options_.draft_length > 0) {
      options_.prefill_chunk = (std::min)(options_.prefill_chunk, draft.shape().max_slots);
    }
    needs_ = guide.needs();
    pace_ = detail::round_pace(options_, sizes_, !std::same_as<Guide, no_guide>);
    cache_ = kv_cache<T, B>(sizes_.target_cache);
    if (options_.draft_length > 0) drafter_.emplace(ctx, draft, options_, sizes_, needs_.draft_weights);
    const std::int32_t slots = (std::max)(sizes_.verify_slots, options_.prefill_chunk);
    allocate(slots);
    guide_->prepare({shape_, options_.draft_length > 0 ? draft.shape() : model_shape{}, sizes_.sequences,
                     sizes_.positions, sizes_.verify_slots, sizes_.recorded_rows});
    std::size_t need = attend_workspace_bytes(
        ctx, {sizes_.sequences, slots, shape_.q_heads, shape_.kv_heads, shape_.head_dim, sizes_.positions});
    need = (std::max)({need, guide_->workspace_bytes(ctx), verify_workspace_bytes(ctx, sizes_.judged, shape_.vocab)});
    if (drafter_) need = (std::max)(need, drafter_->workspace_bytes(ctx, sizes_.sequences));
    ctx_->reserve_workspace(need);
  }

  /// Admits a sequence and prefills its prompt (both models, dense). Returns its row, which identifies it until
  /// remove(). `progress(done, total)` is called after each chunk.
  /// \throws contract_error when no row is free, the prompt is empty, too long, or holds a token outside the vocab
  template <class Progress>
  std::int32_t add(const decode_request& request, Progress&& progress) {
    const std::int32_t row = sequences_.take_row(request);
    turns_.begin_anew();
    const auto length = static_cast<std::int32_t>(request.prompt.size());
    for (std::int32_t from = 0; from < length - 1; from += options_.prefill_chunk) {
      const std::int32_t to = (std::min)(from + options_.prefill_chunk, length - 1);
      prefill(*target_, cache_, shape_.vocab, row, from, to);
      if (drafter_) prefill(drafter_->model(), drafter_->cache(), shape_.vocab, row, from, to);
      progress(to, length - 1);
    }
    sequences_.at(row).active = true;
    return row;
  }
  std::int32_t add(const decode_request& request) {
    return add(request, [](std::int32_t, std::int32_t) {});
  }

  /// Starts a row over from the prompt it was admitted with, under another request (whose prompt is not read): what
  /// came behind the prompt is rolled back, nothing is prefilled again.
  void rewind(std::int32_t row, const decode_request& request) {
    sequences_.rewind(row, request);
    turns_.begin_anew();
    const std::int32_t cached = sequences_.at(row).prompt_length - 1;
    cache_.roll_back(row, cached);
    if (drafter_) drafter_->cache().roll_back(row, (std::min)(drafter_->cache().length(row), cached));
    guide_->forget(row);
  }

  /// Runs one round for every running sequence. `on_tokens(row, tokens)` receives what each sequence emitted and
  /// returns false to cancel it. Returns whether a sequence is still running.
  template <class OnTokens>
  bool step(OnTokens&& on_tokens) {
    gather_batch();
    if (batch_.size == 0) return false;
    sparse_ = pace_.choose(batch_, sequences_);
    trace_ = {};
    trace_.sequences = batch_.size;
    double mark = now();
    const std::span<const std::int32_t> rows(batch_.rows.data(), static_cast<std::size_t>(batch_.size));
    reuse_ = batch_.longest_draft() > 0 && turns_.may_reuse(options_.record_every, rows, sparse_);
    if (drafter_) drafter_->run(batch_, sequences_, trace_.counts, turns_.may_continue(rows), reuse_);
    trace_.draft_seconds = lap(mark);
    lay_out_verify_pass();
    auto state = round();
    choose_rows(state);
    turns_.take(rows, batch_.longest_draft() > 0, sparse_, any_dense(), reuse_);
    trace_.guide_seconds = lap(mark);
    run_target(state);
    trace_.verify_seconds = lap(mark);
    judge();
    bool running = false;
    for (std::int32_t s = 0; s < batch_.size; ++s) {
      count_rows(state, s);
      running = settle(s, on_tokens) || running;
    }
    trace_.accept_seconds = lap(mark);
    guide_->after_verify(*ctx_, state);
    trace_.guide_seconds += lap(mark);
    pace_.learn(trace_);
    return running;
  }

  /// Frees a row, its cached positions and what the guide remembers of it.
  void remove(std::int32_t row) {
    static_cast<void>(sequences_.at(row));  // refuses a row that is none
    cache_.clear(row);
    if (drafter_) drafter_->cache().clear(row);
    guide_->forget(row);
    sequences_.free_row(row);
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
    const std::int32_t row =
        add({.prompt = tokens.first(static_cast<std::size_t>(prefill)), .max_new_tokens = length - prefill});
    batch_.forced = tokens;
    loss_ = loss;
    while (step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
    }
    batch_.forced = {};
    loss_ = {};
    const decode_counts counts = sequences_.at(row).counts;
    remove(row);
    return counts;
  }

  std::span<const std::int32_t> text(std::int32_t row) const { return sequences_.at(row).text; }
  finish_reason finish(std::int32_t row) const { return sequences_.at(row).finish; }
  const decode_counts& counts(std::int32_t row) const { return sequences_.at(row).counts; }
  const round_trace& last_round() const { return trace_; }
  const decode_options& options() const { return options_; }
  /// What adaptive rounds have learnt of costs; null where the options are not adaptive.
  const round_planner* planner() const { return pace_.planner(); }
  const kv_cache<T, B>& cache() const { return cache_; }

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

  void allocate(std::int32_t slots) {
    sequences_ = detail::sequence_table(sizes_, shape_.vocab, options_.draft_length);
    batch_ = detail::round_batch(sizes_, shape_.vocab);
    turns_ = detail::recording_turns(sizes_.sequences);
    pass_ = detail::pass_arrays(sizes_.sequences, slots);
    lists_ = detail::kept_lists(shape_, sizes_.sequences, sizes_.positions);
    if (needs_.target_weights) weights_ = buffer<float, B>(sizes_.target_weights);
    logits_ = buffer<float, B>(static_cast<std::size_t>(sizes_.judged) * static_cast<std::size_t>(shape_.vocab));
    const auto count = static_cast<std::size_t>(sizes_.sequences);
    replayed_ = buffer<std::int32_t, B>(count);
    accepted_ = buffer<std::int32_t, B>(count);
    next_ = buffer<std::int32_t, B>(count);
    dense_ = buffer<std::uint8_t, B>(count);
    positions_ = buffer<std::int64_t, B>(count);
    samplers_ = buffer<sampler_options, B>(count);
  }

  template <class Model>
  void prefill(Model& model, kv_cache<T, B>& cache, std::int32_t vocab, std::int32_t row, std::int32_t from,
               std::int32_t to) {
    const detail::sequence_state& seq = sequences_.at(row);
    pass_.clear();
    pass_.begin_sequence(cache.length(row));
    for (std::int32_t i = from; i < to; ++i) pass_.add_slot(seq.text[static_cast<std::size_t>(i)], i, false);
    pass_.end_sequence();
    batch_.rows.data()[0] = row;
    cache.reserve(row, to - from);
    attention_pass<T, B> pass(*ctx_, cache, layout());
    model.forward(*ctx_, pass_.batch(), pass, view<float, 2, B>(logits_.data(), {0, vocab}));
    cache.advance(row, to - from);
  }

  pass_layout<B> layout() const {
    return {pass_.slot_offsets.shaped({pass_.sequences + 1}), pass_.kv_lens.shaped({pass_.sequences}),
            batch_.rows.shaped({pass_.sequences})};
  }

  /// Running sequences, and how much each may draft: no further than its limit and the context.
  void gather_batch() {
    batch_.size = 0;
    batch_.judged_offsets.data()[0] = 0;
    for (std::int32_t row = 0; row < sizes_.sequences; ++row) {
      if (!sequences_.runs(row)) continue;
      const detail::sequence_state& seq = sequences_.at(row);
      const auto length = static_cast<std::int32_t>(seq.text.size());
      const std::int32_t wanted = seq.max_new_tokens - (length - seq.prompt_length) - 1;
      const std::int32_t s = batch_.size++;
      batch_.rows.data()[s] = row;
      batch_.draft_length(s) = (std::min)({seq.draft_length, wanted, sizes_.positions - length});
      batch_.judged_offsets.data()[s + 1] = batch_.judged_offsets.data()[s] + batch_.draft_length(s) + 1;
    }
  }

  /// A sequence's slots: positions to rewrite (when it is refreshed), its last token, its drafted tokens.
  void lay_out_verify_pass() {
    pass_.clear();
    for (std::int32_t s = 0; s < batch_.size; ++s) {
      detail::sequence_state& seq = in_batch(s);
      const std::int32_t row = batch_.rows.data()[s];
      const auto length = static_cast<std::int32_t>(seq.text.size());
      const bool refresh = options_.refresh_every > 0 && seq.rounds_since_refresh >= options_.refresh_every &&
                           seq.exact_length < length - 1;
      if (refresh) cache_.roll_back(row, seq.exact_length);
      const std::int32_t kv_len = cache_.length(row);
      replayed_.data()[s] = length - 1 - kv_len;
      dense_.data()[s] = refresh || !sparse_ || kv_len < options_.min_context ||
                         (drafts && needs_.draft_weights && batch_.draft_length(s) == 0);
      pass_.begin_sequence(kv_len);
      for (std::int32_t i = kv_len; i < length; ++i) {
        pass_.add_slot(seq.text[static_cast<std::size_t>(i)], i, i == length - 1);
      }
      for (std::int32_t i = 0; i < batch_.draft_length(s); ++i) {
        pass_.add_slot(batch_.drafted.data()[batch_.first_drafted(s) + i], length + i, true);
      }
      pass_.end_sequence();
    }
  }

  round_state<T, B> round() {
    const auto n = static_cast<std::size_t>(batch_.size);
    round_state<T, B> state;
    state.target_cache = &cache_;
    state.cache_rows = {batch_.rows.data(), n};
    state.kv_lens = {pass_.kv_lens.data(), n};
    state.slot_offsets = {pass_.slot_offsets.data(), n + 1};
    state.dense = {dense_.data(), n};
    state.replayed = {replayed_.data(), n};
    state.accepted = {accepted_.data(), n};
    state.layers = shape_.layers;
    state.kv_heads = shape_.kv_heads;
    state.kept = lists_.of(batch_.size);
    std::fill_n(&state.kept.counts[0], state.kept.groups(), 0);
    if (drafter_) {
      state.draft_weights = drafter_->weights(batch_.size);
      state.draft_masses = drafter_->masses(batch_.size);
      state.draft_steps = drafter_->recorded(batch_.size);
    }
    if (!weights_.empty()) {
      state.target_weights =
          view<const float, 4, B>(weights_.data(), {shape_.layers, pass_.slots, shape_.q_heads, sizes_.positions});
    }
    return state;
  }

  bool any_dense() const {
    return std::any_of(dense_.data(), dense_.data() + batch_.size, [](std::uint8_t dense) { return dense != 0; });
  }

  /// The guide's selection, or the last one and the positions since; everything where that is asked for.
  void choose_rows(round_state<T, B>& state) {
    const bool reuse = reuse_ && needs_.draft_weights;
    for (std::int32_t s = 0; reuse && s < batch_.size; ++s) lists_.grow(s, batch_.size, pass_.kv_lens.data()[s]);
    if (!reuse) guide_->before_verify(*ctx_, state);
    for (std::int32_t layer = 0; layer < shape_.layers; ++layer) {
      for (std::int32_t s = 0; s < batch_.size; ++s) {
        if (layer < options_.dense_layers || dense_.data()[s] != 0) state.keep_everything(layer, s);
      }
    }
    if (!reuse) lists_.note(state.kv_lens);
  }

  void run_target(round_state<T, B>& state) {
    attention_pass<T, B> pass(*ctx_, cache_, layout());
    pass.guide_by(state.kept);
    if (!weights_.empty()) {
      pass.record({weights_.data(), state.target_weights.extents()}, record_slots::all);
    }
    struct hooked {
      decoder* self;
      round_state<T, B>* state;
    } object{this, &state};
    pass.before_each_layer({&object, [](void* erased, std::int32_t layer, view<const float, 3, B> q) {
                              const auto& hook = *static_cast<hooked*>(erased);
                              hook.self->guide_->before_layer(*hook.self->ctx_, *hook.state, layer, q);
                            }});
    for (std::int32_t s = 0; s < batch_.size; ++s) cache_.reserve(batch_.rows.data()[s], slots_of(s));
    target_->forward(*ctx_, pass_.batch(), pass, view<float, 2, B>(logits_.data(), {pass_.rows, shape_.vocab}));
    for (std::int32_t s = 0; s < batch_.size; ++s) cache_.advance(batch_.rows.data()[s], slots_of(s));
  }

  void judge() {
    if (!batch_.forced.empty()) return judge_forced();
    for (std::int32_t s = 0; s < batch_.size; ++s) {
      samplers_.data()[s] = in_batch(s).sampler;
      positions_.data()[s] = static_cast<std::int64_t>(in_batch(s).text.size());
    }
    const std::int32_t judged = batch_.judged_offsets.data()[batch_.size];
    verify_args<B> args;
    args.target_logits = logits_.shaped({judged, shape_.vocab});
    args.draft_probabilities = view<float, 2, B>(batch_.probabilities.data(), {judged - batch_.size, shape_.vocab});
    args.drafted = batch_.drafted.shaped({judged - batch_.size});
    args.slot_offsets = batch_.judged_offsets.shaped({batch_.size + 1});
    args.samplers = samplers_.shaped({batch_.size});
    args.positions = positions_.shaped({batch_.size});
    args.accepted = accepted_.shaped({batch_.size});
    args.next_token = next_.shaped({batch_.size});
    verify(*ctx_, args);
  }

  /// score(): every draft is accepted, the text goes on, and the losses are noted.
  void judge_forced() {
    const detail::sequence_state& seq = in_batch(0);
    const std::size_t length = seq.text.size();
    const std::int32_t drafted = batch_.draft_length(0);
    for (std::int32_t i = 0; i <= drafted; ++i) {
      const std::size_t position = length + static_cast<std::size_t>(i);
      loss_[position - static_cast<std::size_t>(seq.prompt_length)] = detail::token_loss(
          logits_.data() + std::ptrdiff_t{i} * shape_.vocab, shape_.vocab, batch_.forced[position]);
    }
    accepted_.data()[0] = drafted;
    next_.data()[0] = batch_.forced[length + static_cast<std::size_t>(drafted)];
  }

  std::int32_t slots_of(std::int32_t s) const {
    return pass_.slot_offsets.data()[s + 1] - pass_.slot_offsets.data()[s];
  }

  /// Notes what the verify pass read for one sequence, and which of its rows are exact.
  void count_rows(const round_state<T, B>& state, std::int32_t s) {
    detail::sequence_state& seq = in_batch(s);
    const std::int32_t kv_len = pass_.kv_lens.data()[s];
    decode_counts rows = detail::rows_read(state, s, slots_of(s), guide_->metadata_rows(kv_len));
    rows.reused_rounds = reuse_ ? 1 : 0;
    seq.counts += rows;
    trace_.counts += rows;
    if (rows.dense_rounds > 0 && kv_len <= seq.exact_length)
      seq.exact_length = kv_len + slots_of(s);  // cut in settle()
    seq.rounds_since_refresh = rows.refreshed > 0 ? 0 : seq.rounds_since_refresh + 1;
  }

  /// Appends what was decided, rolls both caches back, tells the caller.
  template <class OnTokens>
  bool settle(std::int32_t s, OnTokens& on_tokens) {
    detail::sequence_state& seq = in_batch(s);
    const std::int32_t row = batch_.rows.data()[s];
    const auto before = static_cast<std::int32_t>(seq.text.size());
    detail::expects(next_.data()[s] != no_token, "decode: the target's logits for position ",
                    before + accepted_.data()[s], " of row ", row, " hold no finite value");
    const decode_counts counts = detail::take_tokens(seq, batch_.drafted_of(s), accepted_.data()[s], next_.data()[s]);
    seq.counts += counts;
    trace_.counts += counts;
    const auto length = static_cast<std::int32_t>(seq.text.size());
    cache_.roll_back(row, length - 1);
    if (drafter_) drafter_->cache().roll_back(row, (std::min)(drafter_->cache().length(row), length - 1));
    seq.exact_length = (std::min)(seq.exact_length, length - 1);
    const std::span<const std::int32_t> emitted(seq.text.data() + before, static_cast<std::size_t>(length - before));
    if (!on_tokens(row, emitted) && seq.finish == finish_reason::running) seq.finish = finish_reason::cancelled;
    return seq.finish == finish_reason::running;
  }

  static constexpr bool drafts = !std::same_as<Draft, no_draft>;

  context<B>* ctx_;
  Target* target_;
  Guide* guide_;
  decode_options options_;
  model_shape shape_;
  detail::decode_sizes sizes_;
  guide_needs needs_;
  kv_cache<T, B> cache_;
  std::optional<detail::drafter<T, Draft, B>> drafter_;
  detail::sequence_table sequences_;
  detail::round_batch batch_;
  detail::round_pace pace_;
  detail::recording_turns turns_;
  bool sparse_ = true;  // this round's pace
  bool reuse_ = false;  // this round reads what one before has selected
  detail::pass_arrays pass_;
  detail::kept_lists lists_;
  buffer<float, B> weights_, logits_;
  buffer<std::int32_t, B> replayed_, accepted_, next_;  // [sequences] in batch order
  buffer<std::uint8_t, B> dense_;
  buffer<std::int64_t, B> positions_;
  buffer<sampler_options, B> samplers_;
  std::span<float> loss_;
  round_trace trace_;
};

/// make_decoder<fp16>(ctx, target, draft, guide, options): a decoder over keys and values stored as fp16.
template <storage T, class Target, class Draft, class Guide, backend B>
decoder<T, Target, Draft, Guide, B> make_decoder(context<B>& ctx, Target& target, Draft& draft, Guide& guide,
                                                 const decode_options& options) {
  return decoder<T, Target, Draft, Guide, B>(ctx, target, draft, guide, options);
}

}  // namespace specattn::inline v0_1
