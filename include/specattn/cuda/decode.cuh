// The loop on the device: a round is one captured graph, launched once and waited for once.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "../cost_model.hpp"
#include "../decode.hpp"
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

/// The decoder of the CPU with these differences. A round (draft steps, importance, selection, verify pass, acceptance)
/// is captured as a graph the first time its sequences, draft length and length bucket occur, launched as one, and
/// step() waits for the stream once. All sequences of a round run as many draft steps as the one that drafts most; of
/// the others, the steps beyond their own are not judged. Models get a forward_batch<cuda>.
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
      : ctx_(&ctx), guide_(&guide), options_(options), shape_(target.shape()) {
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
    verifier_.emplace(target, guide, options_, sizes_);
    if (options_.draft_length > 0) drafter_.emplace(draft, options_, sizes_, guide.needs().draft_weights);
    guide_->prepare({shape_, options_.draft_length > 0 ? draft.shape() : model_shape{}, sizes_.sequences,
                     sizes_.positions, sizes_.verify_slots, sizes_.recorded_rows});
    allocate();
  }

  /// Admits a sequence and prefills its prompt, as the cpu does. \sync queued; nothing is waited for
  template <class Progress>
  std::int32_t add(const decode_request& request, Progress&& progress) {
    const std::int32_t row = take_row(request);
    const auto length = static_cast<std::int32_t>(request.prompt.size());
    for (std::int32_t from = 0; from < length - 1; from += options_.prefill_chunk) {
      const std::int32_t to = (std::min)(from + options_.prefill_chunk, length - 1);
      prefill(verifier_->model(), verifier_->cache(), row, from, to);
      if (drafter_) prefill(drafter_->model(), drafter_->cache(), row, from, to);
      progress(to, length - 1);
    }
    sequences_.at(row).active = true;
    return row;
  }
  std::int32_t add(const decode_request& request) {
    return add(request, [](std::int32_t, std::int32_t) {});
  }

  /// Admits a sequence whose prompt the caller has computed elsewhere: before the next step(), the keys and values of all
  /// its tokens but the last must stand in the returned row of target_cache() and draft_cache().
  std::int32_t add_cached(const decode_request& request) {
    const std::int32_t row = take_row(request);
    const auto cached = static_cast<std::int32_t>(request.prompt.size()) - 1;
    const auto hold = [&](kv_cache<T, cuda>& cache) {
      cache.reserve(row, cached);
      cache.advance(row, cached);
      cache.publish(*ctx_);
    };
    hold(verifier_->cache());
    if (drafter_) hold(drafter_->cache());
    sequences_.at(row).active = true;
    return row;
  }

  /// Starts a row over from its prompt under another request; nothing is prefilled again.
  void rewind(std::int32_t row, const decode_request& request) {
    sequences_.rewind(row, request);
    turns_.begin_anew();
    const std::int32_t cached = sequences_.at(row).prompt_length - 1;
    verifier_->cache().roll_back(row, cached);
    if (drafter_) drafter_->cache().roll_back(row, (std::min)(drafter_->cache().length(row), cached));
    fresh_[static_cast<std::size_t>(row)] = 1;
  }

  /// Runs one round for every running sequence; see the cpu's. \sync waits for the stream
  template <class OnTokens>
  bool step(OnTokens&& on_tokens) {
    if (!choose_round()) return false;
    prepare_round();
    graphs_.find(*ctx_, key_, [&] { queue_round(); }).launch(ctx_->stream());
    detail::check_cuda(cudaStreamSynchronize(ctx_->stream()), "decode: round");
    check_tokens_drawn();
    trace_ = {};
    trace_.sequences = static_cast<std::int32_t>(key_.rows.size());
    trace_.draft_seconds = marks_[1].seconds_since(marks_[0]);
    trace_.guide_seconds = marks_[2].seconds_since(marks_[1]) + marks_[5].seconds_since(marks_[4]);
    trace_.verify_seconds = marks_[3].seconds_since(marks_[2]);
    trace_.accept_seconds = marks_[4].seconds_since(marks_[3]);
    bool running = false;
    for (std::int32_t s = 0; s < trace_.sequences; ++s) running = settle(s, on_tokens) || running;
    if (planner_) planner_->learn(trace_, kv_len_);
    return running;
  }

  /// Frees a row and its cached positions.
  void remove(std::int32_t row) {
    static_cast<void>(sequences_.at(row));  // refuses a row that is none
    verifier_->cache().clear(row);
    if (drafter_) drafter_->cache().clear(row);
    sequences_.free_row(row);
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
  const kv_cache<T, cuda>& target_cache() const { return verifier_->cache(); }
  /// \pre there is a draft
  const kv_cache<T, cuda>& draft_cache() const { return drafter_->cache(); }

 private:
  static constexpr bool guided = !std::same_as<Guide, no_guide>;

  void allocate() {
    sequences_ = detail::sequence_table(sizes_, shape_.vocab, options_.draft_length);
    const auto rows = static_cast<std::size_t>(sizes_.sequences);
    turns_ = detail::recording_turns(sizes_.sequences);
    fresh_.assign(rows, 1);
    refreshed_.assign(rows, 0);
    exchange_ = detail::round_exchange(sizes_.sequences, options_.draft_length);
    prefill_ = detail::prefill_arrays(options_.prefill_chunk);
    std::size_t need = verifier_->workspace_bytes(*ctx_, sizes_, options_.prefill_chunk);
    if (drafter_) need = (std::max)(need, drafter_->workspace_bytes(*ctx_, sizes_.sequences));
    ctx_->reserve_workspace(need);
  }

  std::int32_t take_row(const decode_request& request) {
    const std::int32_t row = sequences_.take_row(request);
    turns_.begin_anew();
    fresh_[static_cast<std::size_t>(row)] = 1;
    return row;
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
      room = (std::min)(room, sizes_.positions - length);
      longest = (std::max)(longest, length);
      cached += length;
      all_dense = all_dense && length - 1 < options_.min_context;
    }
    if (key_.rows.empty()) return false;
    key_.drafts = (std::min)(most_wanted, room);
    key_.sparse = guided && !all_dense;
    if (planner_) {
      kv_len_ = cached / static_cast<double>(key_.rows.size());
      const round_setting setting = planner_->choose(static_cast<double>(key_.rows.size()), kv_len_);
      key_.drafts = (std::min)(key_.drafts, setting.draft_length);
      key_.sparse = key_.sparse && setting.sparse;
    }
    key_.sparse = key_.sparse && (key_.drafts > 0 || !guide_->needs().draft_weights);
    key_.max_len = detail::length_bucket(longest, sizes_.positions);
    key_.listed = options_.sparse_draft && key_.drafts > 0 && turns_.may_continue(key_.rows);
    key_.reuse = key_.drafts > 0 && (key_.sparse || options_.sparse_draft) &&
                 turns_.may_reuse(options_.record_every, key_.rows, key_.sparse);
    return true;
  }

  /// Brings the draft's cache to within two tokens of each text, makes room, and tells the device what it must know.
  void prepare_round() {
    bool any_dense = false;
    for (std::size_t s = 0; s < key_.rows.size(); ++s) {
      const std::int32_t row = key_.rows[s];
      const detail::sequence_state& seq = sequences_.at(row);
      const auto length = static_cast<std::int32_t>(seq.text.size());
      std::int32_t draft_cached = length - 1;
      if (key_.drafts > 0) {
        kv_cache<T, cuda>& cache = drafter_->cache();
        while (length - cache.length(row) > 2) {
          const std::int32_t from = cache.length(row);
          prefill(drafter_->model(), cache, row, from, (std::min)(length - 1, from + options_.prefill_chunk));
        }
        draft_cached = cache.length(row);
        cache.reserve(row, length - draft_cached + key_.drafts - 1);
      }
      const bool refreshed = refresh(row);
      verifier_->cache().reserve(row, key_.drafts + 1);
      const std::int32_t* const end = seq.text.data() + length;
      const std::int32_t drafts = (std::min)(wanted_of(seq), key_.drafts);
      const bool dense = refreshed || length - 1 < options_.min_context || drafts == 0;
      any_dense = any_dense || dense;
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
    verifier_->cache().publish(*ctx_);
    if (drafter_) drafter_->cache().publish(*ctx_);
    turns_.take(key_.rows, key_.drafts > 0, key_.sparse, any_dense, key_.reuse);
  }

  /// Where it is due, rewrites a row's keys and values since the last exact one. Returns whether it was.
  bool refresh(std::int32_t row) {
    detail::sequence_state& seq = sequences_.at(row);
    const auto cached = static_cast<std::int32_t>(seq.text.size()) - 1;
    const bool due =
        options_.refresh_every > 0 && seq.rounds_since_refresh >= options_.refresh_every && seq.exact_length < cached;
    refreshed_[static_cast<std::size_t>(row)] = due ? 1 : 0;
    if (!due) return false;
    verifier_->cache().roll_back(row, seq.exact_length);
    while (seq.exact_length < cached) {
      const std::int32_t to = (std::min)(seq.exact_length + options_.prefill_chunk, cached);
      prefill(verifier_->model(), verifier_->cache(), row, seq.exact_length, to);
      seq.exact_length = to;
    }
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
    if (key_.drafts > 0) draft(round, probabilities);
    mark(1);
    if (key_.sparse) verifier_->choose_rows(*ctx_, state, lists);
    mark(2);
    verifier_->run(*ctx_, round, state, key_.sparse);
    mark(3);
    verifier_->judge(*ctx_, round, probabilities);
    detail::start_kernel(*ctx_, detail::report_kernel, dim3(static_cast<unsigned>(n)), 32, lists, "decode");
    exchange_.queue_outputs(*ctx_, round);
    mark(4);
    if constexpr (guided) {
      if (key_.sparse) guide_->after_verify(*ctx_, state);
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

  /// Before anything of a round is taken over.
  void check_tokens_drawn() const {
    for (std::int32_t s = 0; s < static_cast<std::int32_t>(key_.rows.size()); ++s) {
      const std::int32_t row = key_.rows[static_cast<std::size_t>(s)], length = exchange_.told(s).text_len;
      const detail::sequence_output& out = exchange_.heard(s);
      detail::expects(out.undrafted == 0, "decode: the draft's logits behind position ", length - 1, " of row ", row,
                      " hold no finite value");
      detail::expects(out.next != no_token, "decode: the target's logits for position ", length + out.accepted,
                      " of row ", row, " hold no finite value");
    }
  }

  /// Rows that the round read for one sequence.
  decode_counts rows_of(std::int32_t s, std::int32_t length) const {
    const detail::sequence_output& out = exchange_.heard(s);
    const std::int64_t a_position = std::int64_t{shape_.layers} * shape_.kv_heads;
    decode_counts counts;
    counts.kv_rows_read = out.rows_read;
    counts.kv_rows_dense = a_position * (length + exchange_.told(s).drafts);
    counts.dense_rounds = out.dense;
    counts.reused_rounds = key_.reuse ? 1 : 0;
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

  /// Appends what was decided, rolls both caches back, tells the caller.
  template <class OnTokens>
  bool settle(std::int32_t s, OnTokens& on_tokens) {
    const std::int32_t row = key_.rows[static_cast<std::size_t>(s)];
    detail::sequence_state& seq = sequences_.at(row);
    const auto before = static_cast<std::int32_t>(seq.text.size());
    const detail::sequence_output& out = exchange_.heard(s);
    decode_counts counts = detail::take_tokens(seq, exchange_.drafted(s, key_.drafts), out.accepted, out.next);
    counts += rows_of(s, before);
    seq.counts += counts;
    trace_.counts += counts;
    const auto length = static_cast<std::int32_t>(seq.text.size());
    if (out.dense != 0 && before - 1 <= seq.exact_length) seq.exact_length = before + key_.drafts;
    seq.exact_length = (std::min)(seq.exact_length, length - 1);
    seq.rounds_since_refresh = counts.refreshed > 0 ? 0 : seq.rounds_since_refresh + 1;
    verifier_->cache().advance(row, key_.drafts + 1);
    verifier_->cache().roll_back(row, length - 1);
    if (key_.drafts > 0) {
      kv_cache<T, cuda>& cache = drafter_->cache();
      cache.advance(row, before - cache.length(row) + key_.drafts - 1);
      cache.roll_back(row, (std::min)(cache.length(row), length - 1));
    }
    if (key_.sparse) fresh_[static_cast<std::size_t>(row)] = 0;
    const std::span<const std::int32_t> emitted(seq.text.data() + before, static_cast<std::size_t>(length - before));
    if (!on_tokens(row, emitted) && seq.finish == finish_reason::running) seq.finish = finish_reason::cancelled;
    return seq.finish == finish_reason::running;
  }

  context<cuda>* ctx_;
  Guide* guide_;
  decode_options options_;
  model_shape shape_;
  detail::decode_sizes sizes_;
  std::optional<detail::device_verifier<T, Target, Guide>> verifier_;
  std::optional<detail::device_drafter<T, Draft>> drafter_;
  detail::sequence_table sequences_;
  std::vector<std::int32_t> fresh_;      // [rows] 1: no guided round yet
  std::vector<std::int32_t> refreshed_;  // [rows] 1: before this round
  detail::recording_turns turns_;
  std::optional<round_planner> planner_;
  double kv_len_ = 0.0;  // of the round, for the planner
  detail::round_key key_;
  detail::captured_rounds graphs_;
  detail::round_exchange exchange_;
  detail::prefill_arrays prefill_;
  detail::timing_event marks_[6];
  round_trace trace_;
};

}  // namespace specattn::inline v0_1
