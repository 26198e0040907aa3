// A round on the device: one captured graph, launched once and waited for once.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "../decode.hpp"
#include "draft_guide.cuh"
#include "guide.cuh"
#include "round/drafter.cuh"
#include "round/exchange.cuh"
#include "round/verifier.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

template <class G>
concept device_guide = std::same_as<G, no_guide> || requires {
  requires std::same_as<typename G::backend_type, cuda>;
};

/// See round_engine in decode.hpp. A round (draft steps, importance, selection, verify pass, acceptance) is captured as a
/// graph the first time its sequences, longest draft and length bucket occur; how far each of them drafts is read when it runs.
/// Its passes have as many slots as if all drafted as far as the longest: those that nobody needs are padding. Models get a
/// forward_batch<cuda>.
///
/// A round in which the draft fails while it is queued goes without drafts. One whose draft has nothing to draw from loses
/// the tokens from there on, and that sequence reads everything.
///
/// A refresh is a pass of its own before its sequence's round, which then is dense. Greedy text equals the CPU's up to
/// ties of rounding.
template <storage T, class Target, class Draft, class Guide>
class round_engine<T, Target, Draft, Guide, cuda> {
  static_assert(device_guide<Guide>,
                "this guide reads a round on the host; on cuda there are no_guide and draft_guide<cuda>");
  static constexpr bool guided = !std::same_as<Guide, no_guide>;

 public:
  /// \throws contract_error for a stream that cannot be captured
  round_engine(context<cuda>& ctx, Target& target, Draft& draft, Guide& guide, const decode_options& options,
               const decode_sizes& sizes)
      : ctx_(&checked(ctx)),
        guide_(guide),
        options_(options),
        sizes_(sizes),
        shape_(target.shape()),
        verifier_(target, options, sizes, guide_.needs(), guided),
        refreshed_(static_cast<std::size_t>(sizes.sequences)),
        exchange_(sizes.sequences, options.draft_length),
        prefill_(options.prefill_chunk, sizes.sequences) {
    if (options.draft_length > 0) drafter_.emplace(draft, options, sizes, guide_.needs().draft_weights);
    (*guide_).prepare({shape_, options.draft_length > 0 ? draft.shape() : model_shape{}, sizes.sequences,
                       sizes.positions, sizes.verify_slots, sizes.recorded_rows});
    std::size_t need =
        (std::max)(verifier_.workspace_bytes(ctx, sizes, options.prefill_chunk), guide_.workspace_bytes(ctx));
    if (drafter_) need = (std::max)(need, drafter_->workspace_bytes(ctx, sizes.sequences));
    ctx.reserve_workspace(need);
  }

  /// Adds up what an engine allocates on the device. \pre options that decoders run by
  static decode_memory bytes(const model_shape& target, const model_shape& draft, const decode_options& options,
                             const decode_sizes& sizes, const guide_needs& needs, bool is_guided) {
    decode_memory memory;
    memory.logits += round_memory::bytes(sizes.sequences, options.draft_length);
    memory.logits += prefill_arrays::bytes(options.prefill_chunk, sizes.sequences);
    device_verifier<T, Target>::count_bytes(target, options, sizes, needs, is_guided, memory);
    if (options.draft_length > 0)
      device_drafter<T, Draft>::count_bytes(draft, options, sizes, needs.draft_weights, memory);
    return memory;
  }

  kv_cache<T, cuda>& target_cache() { return verifier_.cache(); }
  const kv_cache<T, cuda>& target_cache() const { return verifier_.cache(); }
  kv_cache<T, cuda>* draft_cache() { return drafter_ ? &drafter_->cache() : nullptr; }
  const kv_cache<T, cuda>* draft_cache() const { return drafter_ ? &drafter_->cache() : nullptr; }

  void prefill(std::span<const prefill_part> parts) { prefill_in(verifier_.model(), verifier_.cache(), parts); }
  void prefill_draft(std::span<const prefill_part> parts) { prefill_in(drafter_->model(), drafter_->cache(), parts); }
  /// Nothing: the next round of a row is told that its text is a fresh one.
  static void forget(std::int32_t) {}
  void publish(kv_cache<T, cuda>& cache) { cache.publish(*ctx_); }
  void recapture() { graphs_.clear(); }
  void force(std::span<const std::int32_t> text, std::span<float> losses) {
    forced_ = text;
    losses_ = losses;
  }

  /// \sync waits for the stream
  void run(round_plan& plan, sequence_table& sequences) {
    draft_failed_ = false;
    const captured_graph* graph = nullptr;
    const auto thrown = attempt([&] { graph = &prepare(plan, sequences); });
    if (thrown) {
      if (!std::exchange(drafting_, false) || !forced_.empty()) std::rethrow_exception(thrown);
      failure_ = thrown;
      draft_failed_ = true;
      plan.drop_drafts(guide_.needs().draft_weights);
      graph = &prepare(plan, sequences);
    }
    graph->launch(ctx_->stream());
    check_cuda(cudaStreamSynchronize(ctx_->stream()), "decode: round");
    if (key_.forced) note_losses(sequences);
    advance_caches();
    trace_ = {};
    trace_.draft_seconds = marks_[1].seconds_since(marks_[0]);
    trace_.guide_seconds = marks_[2].seconds_since(marks_[1]) + marks_[5].seconds_since(marks_[4]);
    trace_.verify_seconds = marks_[3].seconds_since(marks_[2]);
    trace_.accept_seconds = marks_[4].seconds_since(marks_[3]);
  }
  /// Nothing: what the next rounds' draft steps read was selected in the graph.
  static void settle() {}

  round_result result(std::int32_t s) const {
    const sequence_output& out = exchange_.heard(s);
    const sequence_input& in = exchange_.told(s);
    return {exchange_.drafted(s, key_.drafts), out.accepted, out.next, in.text_len - 1, in.drafts + 1, rows_of(s)};
  }
  bool drafts_lost() const {
    bool lost = draft_failed_;
    for (std::int32_t s = 0; s < static_cast<std::int32_t>(key_.rows.size()); ++s) lost = lost || lost_drafts(s);
    return lost;
  }
  const round_trace& trace() const { return trace_; }
  const std::exception_ptr& draft_failure() const { return failure_; }
  void note_draft_failure(const std::exception_ptr& thrown) { failure_ = thrown; }

 private:
  static context<cuda>& checked(context<cuda>& ctx) {
    expects(ctx.stream() != nullptr, "decode: the default stream cannot be captured; give the context another");
    return ctx;
  }

  /// Where the model throws, no row is longer; pages that were reserved stay the rows'.
  template <class Model>
  void prefill_in(Model& model, kv_cache<T, cuda>& cache, std::span<const prefill_part> parts) {
    for (const prefill_part& part : parts) cache.reserve(part.row, part.to - cache.length(part.row));
    cache.publish(*ctx_);
    prefill_.upload(*ctx_, parts, [&](std::int32_t row) { return cache.length(row); });
    attention_pass<T, cuda> pass(*ctx_, cache, prefill_.layout());
    model.forward(*ctx_, prefill_.batch(), pass, verifier_.logits(0));
    for (const prefill_part& part : parts) cache.advance(part.row, part.to - cache.length(part.row));
  }

  /// The round's graph, its inputs told.
  const captured_graph& prepare(const round_plan& plan, sequence_table& sequences) {
    key_.rows.clear();
    for (const planned_row& planned : plan.rows) key_.rows.push_back(planned.row);
    static_cast<round_shape&>(key_) = plan;
    key_.max_len = length_bucket(plan.longest, sizes_.positions);
    key_.forced = !forced_.empty();
    for (std::size_t s = 0; s < plan.rows.size(); ++s)
      prepare_sequence(s, plan.rows[s], sequences.at(plan.rows[s].row));
    verifier_.cache().publish(*ctx_);
    if (drafter_) drafter_->cache().publish(*ctx_);
    return graphs_.find(*ctx_, key_, [&] { queue_round(); });
  }

  /// Brings the draft's cache to within two tokens of the text, makes room, and tells the device what it must know.
  void prepare_sequence(std::size_t s, const planned_row& planned, sequence_state& seq) {
    const std::int32_t row = planned.row;
    const auto length = static_cast<std::int32_t>(seq.text.size());
    std::int32_t draft_cached = length - 1;
    if (planned.steps > 0) {
      drafting_ = true;
      kv_cache<T, cuda>& cache = drafter_->cache();
      while (length - cache.length(row) > 2) {
        const prefill_part part{row, seq.text, (std::min)(length - 1, cache.length(row) + options_.prefill_chunk)};
        prefill_draft({&part, 1});
      }
      draft_cached = cache.length(row);
      cache.reserve(row, length - draft_cached + planned.steps - 1);
      drafting_ = false;
    } else if (drafter_) {
      draft_cached = drafter_->cache().length(row);
    }
    if (planned.refresh && !seq.refreshed) refresh(row, seq);
    refreshed_[s] = planned.refresh ? 1 : 0;
    verifier_.cache().reserve(row, planned.drafts + 1);
    if (key_.forced) {
      const auto next =
          forced_.subspan(static_cast<std::size_t>(length), static_cast<std::size_t>(planned.drafts) + 1);
      std::copy(next.begin(), next.end(), exchange_.forced(s, key_.drafts).begin());
    }
    const std::int32_t* const end = seq.text.data() + length;
    const sequence_input input{.cache_row = row,
                               .text_len = length,
                               .draft_cached = draft_cached,
                               .last_but_one = length > 1 ? end[-2] : 0,
                               .last = end[-1],
                               .fresh = seq.fresh ? 1 : 0,
                               .dense = planned.dense ? 1 : 0,
                               .drafts = planned.drafts,
                               .steps = planned.steps};
    exchange_.tell(s, input, seq.sampler);
  }

  /// Rewrites a row's keys and values since the last exact one.
  void refresh(std::int32_t row, sequence_state& seq) {
    const auto cached = static_cast<std::int32_t>(seq.text.size()) - 1;
    verifier_.cache().roll_back(row, seq.exact_length);
    while (seq.exact_length < cached) {
      const prefill_part part{row, seq.text, (std::min)(seq.exact_length + options_.prefill_chunk, cached)};
      prefill({&part, 1});
      seq.exact_length = part.to;
    }
    seq.refreshed = true;
  }

  void queue_round() {
    const auto n = static_cast<std::int32_t>(key_.rows.size());
    round_arrays round = exchange_.arrays(key_);
    round.listed = key_.listed;
    round.reuse = key_.reuse;
    const auto* const drafter = drafter_ ? &*drafter_ : nullptr;
    round_state<T, cuda> state = verifier_.state(round, key_, drafter);
    const kept_launch lists = verifier_.lists(round, state, drafter);
    view<float, 3, cuda> probabilities;
    if (key_.sampled) probabilities = verifier_.probabilities(round);
    mark(0);
    exchange_.queue_inputs(*ctx_, round);
    start_layout(begin_round_kernel, round);
    if (key_.steps > 0) {
      drafting_ = true;
      draft(round, probabilities);
      drafting_ = false;
    }
    mark(1);
    if constexpr (guided) {
      if (key_.sparse) verifier_.choose_rows(*ctx_, guide_, state, lists);
    }
    mark(2);
    verifier_.run(*ctx_, round, state, key_.sparse);
    mark(3);
    key_.forced ? verifier_.judge_forced(*ctx_, round) : verifier_.judge(*ctx_, round, probabilities);
    start_kernel(*ctx_, report_kernel, dim3(static_cast<unsigned>(n)), 32, lists, "decode");
    exchange_.queue_outputs(*ctx_, round);
    mark(4);
    if constexpr (guided) {
      if (key_.sparse) (*guide_).after_verify(*ctx_, state);
    }
    mark(5);
  }

  void draft(const round_arrays& round, view<float, 3, cuda> probabilities) {
    drafter_->queue(*ctx_, round, key_.max_len, probabilities);
    start_layout(take_drafted_kernel, round);
    if (probabilities.empty()) return;
    start_kernel(*ctx_, clear_undrafted_kernel, dim3(static_cast<unsigned>(round.sequences * round.drafts)),
                 layout_threads, undrafted_launch{round, probabilities}, "decode");
  }

  void mark(std::size_t i) const { marks_[i].record(ctx_->stream()); }
  void start_layout(void (*kernel)(round_arrays), const round_arrays& round) const {
    start_kernel(*ctx_, kernel, dim3(1), layout_threads, round, "decode");
  }

  /// Counts in what the round has written; the decoder drops what was not accepted.
  void advance_caches() {
    for (std::size_t s = 0; s < key_.rows.size(); ++s) {
      const std::int32_t row = key_.rows[s];
      const sequence_input& in = exchange_.told(static_cast<std::int32_t>(s));
      verifier_.cache().advance(row, in.drafts + 1);
      if (in.steps == 0) continue;
      kv_cache<T, cuda>& cache = drafter_->cache();
      cache.advance(row, in.text_len - cache.length(row) + in.steps - 1);
    }
  }

  /// Before anything is counted in: a loss that is none refuses the round.
  void note_losses(const sequence_table& sequences) const {
    for (std::size_t s = 0; s < key_.rows.size(); ++s) {
      const sequence_input& in = exchange_.told(static_cast<std::int32_t>(s));
      const std::span<const float> losses = exchange_.losses(s, key_.drafts);
      for (std::int32_t i = 0; i <= in.drafts; ++i) {
        const float loss = losses[static_cast<std::size_t>(i)];
        expects(!std::isnan(loss), "decode: the target's logits for position ", in.text_len + i,
                " of the text hold no finite value");
        losses_[static_cast<std::size_t>(in.text_len + i - sequences.at(in.cache_row).prompt_length)] = loss;
      }
    }
  }

  /// Whether some token of a sequence could not be drawn.
  bool lost_drafts(std::int32_t s) const { return exchange_.heard(s).drafted < exchange_.told(s).drafts; }

  /// Rows that the round read for one sequence.
  decode_counts rows_of(std::int32_t s) const {
    const sequence_output& out = exchange_.heard(s);
    const std::int32_t length = exchange_.told(s).text_len;
    const std::int64_t a_position = std::int64_t{shape_.layers} * shape_.kv_heads;
    decode_counts counts;
    counts.kv_rows_read = out.rows_read;
    counts.kv_rows_dense = a_position * (length + exchange_.told(s).drafts);
    counts.dense_rounds = out.dense;
    counts.reused_rounds = key_.reuse && (out.dense == 0 || options_.sparse_draft) ? 1 : 0;
    counts.draft_failures = draft_failed_ || lost_drafts(s) ? 1 : 0;
    counts.refreshed = refreshed_[static_cast<std::size_t>(s)];
    const std::int64_t steps = exchange_.told(s).steps, growth = steps * (steps - 1) / 2;
    if (steps == 0) return counts;
    counts.draft_steps = steps;
    const std::int64_t a_draft_position = std::int64_t{drafter_->shape().layers} * drafter_->shape().kv_heads;
    counts.draft_rows_dense = a_draft_position * (steps * length + growth);
    counts.draft_rows_read = counts.draft_rows_dense - steps * out.draft_left_out;
    if (drafter_->records() && !key_.reuse)  // keys alone: half of a row
      counts.draft_rows_read += (a_draft_position * (length - 1) + 1) / 2;
    return counts;
  }

  context<cuda>* ctx_;
  held_guide<Guide> guide_;
  decode_options options_;
  decode_sizes sizes_;
  model_shape shape_;
  device_verifier<T, Target> verifier_;
  std::optional<device_drafter<T, Draft>> drafter_;
  std::vector<std::int32_t> refreshed_;  // [sequences of the round] 1: before it
  round_key key_;
  captured_rounds graphs_;
  round_exchange exchange_;
  prefill_arrays prefill_;
  timing_event marks_[6];
  round_trace trace_;
  std::span<const std::int32_t> forced_;  // the text that is drafted and accepted; empty: none
  std::span<float> losses_;
  bool drafting_ = false;      // what throws now is the draft's
  bool draft_failed_ = false;  // so that the round drafts nothing
  std::exception_ptr failure_;
};

}  // namespace specattn::inline SPECATTN_CODE::detail
