// The loop on the device: a round is one captured graph, launched once and waited for once.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "../cost_model.hpp"
#include "../decode.hpp"
#include "../decode_calls.hpp"
#include "draft_guide.cuh"
#include "drafter.cuh"
#include "guide.cuh"
#include "round_exchange.cuh"
#include "verifier.cuh"

namespace specattn::inline v0_1 {

namespace detail {

template <class G>
concept device_guide = std::same_as<G, no_guide> || requires {
  requires std::same_as<typename G::backend_type, cuda>;
};

}  // namespace detail

/// The decoder of the CPU, its guarantee after exceptions included, with these differences. A round (draft steps, importance, selection, verify pass, acceptance)
/// is captured as a graph the first time its sequences, draft length and length bucket occur, launched as one, and
/// step() waits for the stream once. All sequences of a round run as many draft steps as the one that drafts most; of
/// the others, the steps beyond their own are not judged. Models get a forward_batch<cuda>.
///
/// A round in which the draft fails while it is queued goes without drafts; one whose draft has nothing to draw from loses
/// the tokens from there on, and that sequence's lists keep everything. All sequences of a round draft no further than the
/// one with the least room in the context, or in the draft's.
///
/// A refresh is a pass of its own before its sequence's round, which then is dense. Greedy text equals the CPU's up to
/// ties of rounding. Not on cuda: score().
/// last_round()'s seconds are the device's, from events between the parts of a round.
template <storage T, class Target, class Draft, class Guide>
  requires language_model<Target, cuda> && language_model<Draft, cuda> && guide<Guide, T, cuda>
class decoder<T, Target, Draft, Guide, cuda> {
  static_assert(detail::device_guide<Guide>,
                "this guide reads a round on the host; on cuda there are no_guide and draft_guide<cuda>");

 public:
  /// \throws contract_error for models that do not fit each other or the options, a stream that cannot be captured
  /// \sync   waits for the device
  decoder(context<cuda>& ctx, Target& target, Draft& draft, Guide& guide, const decode_options& options)
      : ctx_(&ctx), guide_(guide), options_(options), shape_(target.shape()) {
    detail::expects(ctx.stream() != nullptr,
                    "decode: the default stream cannot be captured; give the context another");
    decode_options round = options_;
    round.refresh_every = (std::min)(options_.refresh_every, 0);  // takes no slots of the verify pass here
    sizes_ = detail::decode_sizes(shape_, draft.shape(), round);
    detail::check_decode(shape_, draft.shape(), round, sizes_);
    options_.prefill_chunk = (std::min)(options_.prefill_chunk, shape_.max_slots);
    if (options_.draft_length > 0)
      options_.prefill_chunk = (std::min)(options_.prefill_chunk, draft.shape().max_slots);
    if (options_.adaptive && options_.draft_length > 0) {
      planner_.emplace(double(shape_.layers) * shape_.kv_heads, double(draft.shape().layers) * draft.shape().kv_heads,
                       options_.draft_length, guided);
    }
    verifier_.emplace(target, options_, sizes_, guide_.needs(), guided);
    if (options_.draft_length > 0) drafter_.emplace(draft, options_, sizes_, guide_.needs().draft_weights);
    guide_.prepare({shape_, options_.draft_length > 0 ? draft.shape() : model_shape{}, sizes_.sequences,
                    sizes_.positions, sizes_.verify_slots, sizes_.recorded_rows});
    allocate();
  }

  /// Admits a sequence and prefills its prompt, as the cpu does. \sync queued; nothing is waited for
  template <class Progress>
  std::int32_t add(const decode_request& request, Progress&& progress) {
    const auto busy = calls_.enter("add()", true);
    return admit(request, [&](std::int32_t row, std::span<const std::int32_t> text) {
      const auto length = static_cast<std::int32_t>(text.size());
      bool drafted = drafter_.has_value();
      for (std::int32_t from = 0; from < length - 1; from += options_.prefill_chunk) {
        const std::int32_t to = (std::min)(from + options_.prefill_chunk, length - 1);
        prefill(verifier_->model(), verifier_->cache(), row, from, to);
        const std::int32_t reach = drafted ? (std::min)(to, sizes_.draft_cache.max_positions) : 0;
        if (from < reach) {
          const auto thrown =
              detail::attempt([&] { prefill(drafter_->model(), drafter_->cache(), row, from, reach); });
          if (thrown) draft_failure_ = thrown;  // it catches up later
          drafted = !thrown;
        }
        progress(to, length - 1);
      }
    });
  }
  std::int32_t add(const decode_request& request) {
    return add(request, [](std::int32_t, std::int32_t) {});
  }

  /// Admits a sequence whose prompt the caller has computed elsewhere: before the next step(), the keys and values of all
  /// its tokens but the last must stand in the returned row of target_cache() and draft_cache().
  std::int32_t add_cached(const decode_request& request) {
    const auto busy = calls_.enter("add_cached()", true);
    return admit(request, [&](std::int32_t row, std::span<const std::int32_t> text) {
      const auto hold = [&](kv_cache<T, cuda>& cache) {
        const std::int32_t cached =
            (std::min)(static_cast<std::int32_t>(text.size()) - 1, cache.shape().max_positions);
        cache.reserve(row, cached);
        cache.advance(row, cached);
        cache.publish(*ctx_);
      };
      hold(verifier_->cache());
      if (drafter_) hold(drafter_->cache());
    });
  }

  /// Starts a row over from its prompt under another request; nothing is prefilled again.
  void rewind(std::int32_t row, const decode_request& request) {
    const auto busy = calls_.enter("rewind()", true);
    sequences_.rewind(row, request);
    begin_text(row);
    roll_back(row, sequences_.at(row).prompt_length - 1);
  }

  /// Runs one round for every running sequence; see the cpu's. \sync waits for the stream
  template <class OnTokens>
  bool step(OnTokens&& on_tokens) {
    const auto busy = calls_.enter("step()", false);
    if (!choose_round()) return false;
    run_round();
    commit();
    if (planner_) planner_->learn(trace_, kv_len_);
    const auto delivering = calls_.deliver();
    detail::raise_failures(delivery_.deliver(sequences_, on_tokens), failed_row_, failed_position_);
    return sequences_.any_running();
  }

  /// Frees a row and its cached positions.
  void remove(std::int32_t row) {
    const auto busy = calls_.enter("remove()", true);
    static_cast<void>(sequences_.at(row));  // refuses a row that is none
    release(row);
  }

  /// Forgets the captured rounds, as a change of the guide's rule asks for.
  void recapture() { graphs_.clear(); }

  std::span<const std::int32_t> text(std::int32_t row) const { return sequences_.at(row).text; }
  finish_reason finish(std::int32_t row) const { return sequences_.at(row).finish; }
  const decode_counts& counts(std::int32_t row) const { return sequences_.at(row).counts; }
  const round_trace& last_round() const { return trace_; }
  const decode_options& options() const { return options_; }
  /// What adaptive rounds have learnt of costs; null where the options are not adaptive.
  const round_planner* planner() const { return planner_ ? &*planner_ : nullptr; }
  /// What the draft threw last; null: it never did.
  std::exception_ptr draft_failure() const { return draft_failure_; }
  const kv_cache<T, cuda>& target_cache() const { return verifier_->cache(); }
  /// \pre there is a draft
  const kv_cache<T, cuda>& draft_cache() const { return drafter_->cache(); }

 private:
  static constexpr bool guided = !std::same_as<Guide, no_guide>;

  void allocate() {
    sequences_ = detail::sequence_table(sizes_, shape_.vocab, options_.draft_length);
    const auto rows = static_cast<std::size_t>(sizes_.sequences);
    delivery_ = detail::token_delivery(sizes_.sequences);
    turns_ = detail::recording_turns(sizes_.sequences);
    fresh_.assign(rows, 1);
    refreshed_.assign(rows, 0);
    exchange_ = detail::round_exchange(sizes_.sequences, options_.draft_length);
    prefill_ = detail::prefill_arrays(options_.prefill_chunk);
    std::size_t need =
        (std::max)(verifier_->workspace_bytes(*ctx_, sizes_, options_.prefill_chunk), guide_.workspace_bytes(*ctx_));
    if (drafter_) need = (std::max)(need, drafter_->workspace_bytes(*ctx_, sizes_.sequences));
    ctx_->reserve_workspace(need);
  }

  /// Takes a row and lets `cache(row, text)` fill it; the row is free again if that throws.
  template <class Cache>
  std::int32_t admit(const decode_request& request, Cache&& cache) {
    const std::int32_t row = sequences_.take_row(request);
    detail::undo_scope undo([&] { release(row); });
    cache(row, std::span<const std::int32_t>(sequences_.at(row).text));
    sequences_.at(row).active = true;
    begin_text(row);
    undo.dismiss();
    return row;
  }
  /// What rounds before have left for this row is of no use to its text.
  void begin_text(std::int32_t row) {
    turns_.begin_anew();
    fresh_[static_cast<std::size_t>(row)] = 1;
    refreshed_[static_cast<std::size_t>(row)] = 0;
  }
  void release(std::int32_t row) {
    verifier_->cache().clear(row);
    if (drafter_) drafter_->cache().clear(row);
    sequences_.free_row(row);
  }
  /// Both caches to `cached` positions of a row, or what they hold of them; pages reserved beyond return.
  void roll_back(std::int32_t row, std::int32_t cached) {
    const auto cut = [&](kv_cache<T, cuda>& cache) { cache.roll_back(row, (std::min)(cache.length(row), cached)); };
    cut(verifier_->cache());
    if (drafter_) cut(drafter_->cache());
  }

  /// Caches tokens [from, to) of a row's text.
  template <class Model>
  void prefill(Model& model, kv_cache<T, cuda>& cache, std::int32_t row, std::int32_t from, std::int32_t to) {
    const std::int32_t count = to - from;
    cache.reserve(row, count);
    cache.publish(*ctx_);
    prefill_.upload(*ctx_, {sequences_.at(row).text.data() + from, static_cast<std::size_t>(count)}, from,
                    cache.length(row), row);
    attention_pass<T, cuda> pass(*ctx_, cache, prefill_.layout());
    model.forward(*ctx_, prefill_.batch(), pass, verifier_->logits(0));
    cache.advance(row, count);
  }

  /// Tokens that a sequence would draft: no further than its limit.
  static std::int32_t wanted_of(const detail::sequence_state& seq) {
    const auto length = static_cast<std::int32_t>(seq.text.size());
    return (std::min)(seq.draft_length, seq.max_new_tokens - (length - seq.prompt_length) - 1);
  }

  /// Who runs, how far, and how. Returns whether anybody does.
  bool choose_round() {
    key_ = {};
    const std::int32_t draft_reach = sizes_.draft_cache.max_positions + 1;
    std::int32_t most_wanted = 0, room = sizes_.positions, longest = 0;
    double cached = 0.0;
    bool all_dense = true;
    for (std::int32_t row = 0; row < sizes_.sequences; ++row) {
      if (!sequences_.runs(row)) continue;
      const detail::sequence_state& seq = sequences_.at(row);
      const auto length = static_cast<std::int32_t>(seq.text.size());
      key_.rows.push_back(row);
      key_.sampled = key_.sampled || !seq.sampler.greedy();
      most_wanted = (std::max)(most_wanted, wanted_of(seq));
      room = (std::min)({room, sizes_.positions - length, drafter_ ? draft_reach - length : 0});
      longest = (std::max)(longest, length);
      cached += length;
      all_dense = all_dense && length - 1 < options_.min_context;
    }
    if (key_.rows.empty()) return false;
    key_.drafts = (std::max)(0, (std::min)(most_wanted, room));
    key_.sparse = guided && !all_dense;
    if (planner_) {
      kv_len_ = cached / static_cast<double>(key_.rows.size());
      const round_setting setting = planner_->choose(static_cast<double>(key_.rows.size()), kv_len_);
      key_.drafts = (std::min)(key_.drafts, setting.draft_length);
      key_.sparse = key_.sparse && setting.sparse;
    }
    key_.sparse = key_.sparse && (key_.drafts > 0 || !guide_.needs().draft_weights);
    key_.max_len = detail::length_bucket(longest, sizes_.positions);
    key_.listed = options_.sparse_draft && key_.drafts > 0 && turns_.may_continue(key_.rows);
    key_.reuse = key_.drafts > 0 && (key_.sparse || options_.sparse_draft) &&
                 turns_.may_reuse(options_.record_every, key_.rows, key_.sparse);
    return true;
  }

  /// Queues the round as one graph and waits for it. A round that throws before it is launched has not been.
  void run_round() {
    detail::undo_scope undo([&] {
      for (const std::int32_t row : key_.rows)
        roll_back(row, static_cast<std::int32_t>(sequences_.at(row).text.size()) - 1);
    });
    draft_failed_ = false;
    const detail::captured_graph* graph = nullptr;
    const auto thrown = detail::attempt([&] { graph = &prepared_round(); });
    if (thrown) {
      if (!std::exchange(drafting_, false)) std::rethrow_exception(thrown);
      draft_failure_ = thrown;
      draft_failed_ = true;
      key_.drafts = 0;
      key_.listed = key_.reuse = false;
      key_.sparse = key_.sparse && !guide_.needs().draft_weights;
      graph = &prepared_round();
    }
    graph->launch(ctx_->stream());
    detail::check_cuda(cudaStreamSynchronize(ctx_->stream()), "decode: round");
    undo.dismiss();
    trace_ = {};
    trace_.sequences = static_cast<std::int32_t>(key_.rows.size());
    trace_.draft_seconds = marks_[1].seconds_since(marks_[0]);
    trace_.guide_seconds = marks_[2].seconds_since(marks_[1]) + marks_[5].seconds_since(marks_[4]);
    trace_.verify_seconds = marks_[3].seconds_since(marks_[2]);
    trace_.accept_seconds = marks_[4].seconds_since(marks_[3]);
  }

  const detail::captured_graph& prepared_round() {
    any_dense_ = false;
    for (std::size_t s = 0; s < key_.rows.size(); ++s) prepare_sequence(s);
    verifier_->cache().publish(*ctx_);
    if (drafter_) drafter_->cache().publish(*ctx_);
    return graphs_.find(*ctx_, key_, [&] { queue_round(); });
  }

  /// Brings the draft's cache to within two tokens of the text, makes room, and tells the device what it must know.
  void prepare_sequence(std::size_t s) {
    const std::int32_t row = key_.rows[s];
    const detail::sequence_state& seq = sequences_.at(row);
    const auto length = static_cast<std::int32_t>(seq.text.size());
    std::int32_t draft_cached = length - 1;
    if (key_.drafts > 0) {
      drafting_ = true;
      kv_cache<T, cuda>& cache = drafter_->cache();
      while (length - cache.length(row) > 2) {
        const std::int32_t from = cache.length(row);
        prefill(drafter_->model(), cache, row, from, (std::min)(length - 1, from + options_.prefill_chunk));
      }
      draft_cached = cache.length(row);
      cache.reserve(row, length - draft_cached + key_.drafts - 1);
      drafting_ = false;
    }
    const bool refreshed = refresh(row);
    verifier_->cache().reserve(row, key_.drafts + 1);
    const std::int32_t* const end = seq.text.data() + length;
    const std::int32_t drafts = (std::min)(wanted_of(seq), key_.drafts);
    const bool dense = refreshed || length - 1 < options_.min_context || drafts == 0;
    any_dense_ = any_dense_ || dense;
    const detail::sequence_input input{.cache_row = row,
                                       .text_len = length,
                                       .draft_cached = draft_cached,
                                       .last_but_one = length > 1 ? end[-2] : 0,
                                       .last = end[-1],
                                       .fresh = fresh_[static_cast<std::size_t>(row)],
                                       .dense = dense ? 1 : 0,
                                       .drafts = drafts};
    exchange_.tell(s, input, seq.sampler);
  }

  /// Where it is due, rewrites a row's keys and values since the last exact one. Returns whether that was done since the
  /// last round that stands.
  bool refresh(std::int32_t row) {
    detail::sequence_state& seq = sequences_.at(row);
    std::int32_t& done = refreshed_[static_cast<std::size_t>(row)];
    const auto cached = static_cast<std::int32_t>(seq.text.size()) - 1;
    const bool due =
        options_.refresh_every > 0 && seq.rounds_since_refresh >= options_.refresh_every && seq.exact_length < cached;
    if (!due) return done != 0;
    verifier_->cache().roll_back(row, seq.exact_length);
    while (seq.exact_length < cached) {
      const std::int32_t to = (std::min)(seq.exact_length + options_.prefill_chunk, cached);
      prefill(verifier_->model(), verifier_->cache(), row, seq.exact_length, to);
      seq.exact_length = to;
    }
    done = 1;
    return true;
  }

  void queue_round() {
    const auto n = static_cast<std::int32_t>(key_.rows.size());
    detail::round_arrays round = exchange_.arrays(n, key_.drafts);
    round.listed = key_.listed;
    round.reuse = key_.reuse;
    const auto* const drafter = drafter_ ? &*drafter_ : nullptr;
    round_state<T, cuda> state = verifier_->state(round, key_, drafter);
    const detail::kept_launch lists = verifier_->lists(round, state, drafter);
    view<float, 3, cuda> probabilities;
    if (key_.sampled) probabilities = verifier_->probabilities(round);
    mark(0);
    exchange_.queue_inputs(*ctx_, round);
    start_layout(detail::begin_round_kernel, round);
    if (key_.drafts > 0) {
      drafting_ = true;
      draft(round, probabilities);
      drafting_ = false;
    }
    mark(1);
    if constexpr (guided) {
      if (key_.sparse) verifier_->choose_rows(*ctx_, guide_, state, lists);
    }
    mark(2);
    verifier_->run(*ctx_, round, state, key_.sparse);
    mark(3);
    verifier_->judge(*ctx_, round, probabilities);
    detail::start_kernel(*ctx_, detail::report_kernel, dim3(static_cast<unsigned>(n)), 32, lists, "decode");
    exchange_.queue_outputs(*ctx_, round);
    mark(4);
    if constexpr (guided) {
      if (key_.sparse) guide_.after_verify(*ctx_, state);
    }
    mark(5);
  }

  void draft(const detail::round_arrays& round, view<float, 3, cuda> probabilities) {
    drafter_->queue(*ctx_, round, key_.max_len, probabilities);
    start_layout(detail::take_drafted_kernel, round);
    if (probabilities.empty()) return;
    detail::start_kernel(*ctx_, detail::clear_undrafted_kernel,
                         dim3(static_cast<unsigned>(round.sequences * round.drafts)), detail::layout_threads,
                         detail::undrafted_launch{round, probabilities}, "decode");
  }

  void mark(std::size_t i) const { marks_[i].record(ctx_->stream()); }
  void start_layout(void (*kernel)(detail::round_arrays), const detail::round_arrays& round) const {
    detail::start_kernel(*ctx_, kernel, dim3(1), detail::layout_threads, round, "decode");
  }

  /// Takes the round over, for every sequence whose logits could be judged.
  void commit() {
    turns_.take(key_.rows, key_.drafts > 0, key_.sparse, any_dense_, key_.reuse);
    delivery_.clear();
    failed_row_ = -1;
    bool drafts_lost = draft_failed_;
    for (std::int32_t s = 0; s < trace_.sequences; ++s) {
      const std::int32_t row = key_.rows[static_cast<std::size_t>(s)];
      detail::sequence_state& seq = sequences_.at(row);
      const auto before = static_cast<std::int32_t>(seq.text.size());
      const detail::sequence_output& out = exchange_.heard(s);
      drafts_lost = drafts_lost || out.drafted < exchange_.told(s).drafts;
      verifier_->cache().advance(row, key_.drafts + 1);
      if (key_.drafts > 0) {
        kv_cache<T, cuda>& cache = drafter_->cache();
        cache.advance(row, before - cache.length(row) + key_.drafts - 1);
      }
      if (out.accepted >= 0) {
        trace_.counts += detail::commit_round(seq, exchange_.drafted(s, key_.drafts), out.accepted, out.next,
                                              rows_of(s, before), before - 1, key_.drafts + 1);
        delivery_.note(row, seq, before);
        if (key_.sparse) fresh_[static_cast<std::size_t>(row)] = 0;
        refreshed_[static_cast<std::size_t>(row)] = 0;
      } else if (failed_row_ < 0) {
        failed_row_ = row;
        failed_position_ = before;
      }
      roll_back(row, static_cast<std::int32_t>(seq.text.size()) - 1);
    }
    if (drafts_lost) turns_.begin_anew();
  }

  /// Rows that the round read for one sequence.
  decode_counts rows_of(std::int32_t s, std::int32_t length) const {
    const detail::sequence_output& out = exchange_.heard(s);
    const std::int64_t a_position = std::int64_t{shape_.layers} * shape_.kv_heads;
    decode_counts counts;
    counts.kv_rows_read = out.rows_read;
    counts.kv_rows_dense = a_position * (length + exchange_.told(s).drafts);
    counts.dense_rounds = out.dense;
    counts.reused_rounds = key_.reuse && (out.dense == 0 || options_.sparse_draft) ? 1 : 0;
    counts.draft_failures = draft_failed_ || out.drafted < exchange_.told(s).drafts ? 1 : 0;
    counts.refreshed = refreshed_[static_cast<std::size_t>(key_.rows[static_cast<std::size_t>(s)])];
    if (key_.drafts == 0) return counts;
    const std::int64_t drafts = key_.drafts, growth = drafts * (drafts - 1) / 2;
    const std::int64_t a_draft_position = std::int64_t{drafter_->shape().layers} * drafter_->shape().kv_heads;
    counts.draft_rows_dense = a_draft_position * (drafts * length + growth);
    counts.draft_rows_read = counts.draft_rows_dense - drafts * out.draft_left_out;
    if (drafter_->records() && !key_.reuse)  // keys alone: half of a row
      counts.draft_rows_read += (a_draft_position * (length - 1) + 1) / 2;
    return counts;
  }

  context<cuda>* ctx_;
  detail::held_guide<Guide> guide_;
  decode_options options_;
  model_shape shape_;
  detail::decode_sizes sizes_;
  std::optional<detail::device_verifier<T, Target>> verifier_;
  std::optional<detail::device_drafter<T, Draft>> drafter_;
  detail::sequence_table sequences_;
  std::vector<std::int32_t> fresh_;      // [rows] 1: no guided round yet
  std::vector<std::int32_t> refreshed_;  // [rows] 1: since the last round that stands
  detail::recording_turns turns_;
  std::optional<round_planner> planner_;
  double kv_len_ = 0.0;  // of the round, for the planner
  detail::round_key key_;
  detail::captured_rounds graphs_;
  detail::round_exchange exchange_;
  detail::prefill_arrays prefill_;
  detail::timing_event marks_[6];
  round_trace trace_;
  bool any_dense_ = false;     // of the round's sequences
  bool drafting_ = false;      // what throws now is the draft's
  bool draft_failed_ = false;  // so that the round drafts nothing
  std::exception_ptr draft_failure_;
  detail::call_guard calls_;
  detail::token_delivery delivery_;
  std::int32_t failed_row_ = -1;  // whose logits could not be judged, and at which position
  std::int32_t failed_position_ = 0;
};

}  // namespace specattn::inline v0_1
