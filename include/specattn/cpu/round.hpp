// A round on the CPU: the draft's steps, the guide, the target's pass, one after another.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>

#include "../decode.hpp"
#include "context.hpp"
#include "drafter.hpp"
#include "round_batch.hpp"
#include "verifier.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// See round_engine in decode.hpp.
template <storage T, class Target, class Draft, class Guide>
class round_engine<T, Target, Draft, Guide, cpu> {
 public:
  round_engine(context<cpu>& ctx, Target& target, Draft& draft, Guide& guide, const decode_options& options,
               const decode_sizes& sizes)
      : ctx_(&ctx),
        guide_(guide),
        options_(options),
        verifier_(ctx, target, options, sizes, guide_.needs()),
        batch_(sizes, target.shape().vocab) {
    if (options.draft_length > 0) drafter_.emplace(ctx, draft, options, sizes, guide_.needs().draft_weights);
    (*guide_).prepare({target.shape(), options.draft_length > 0 ? draft.shape() : model_shape{}, sizes.sequences,
                       sizes.positions, sizes.verify_slots, sizes.recorded_rows});
    std::size_t need = (std::max)(verifier_.workspace_bytes(ctx), guide_.workspace_bytes(ctx));
    if (drafter_) need = (std::max)(need, drafter_->workspace_bytes(ctx, sizes.sequences));
    ctx.reserve_workspace(need);
  }

  /// Adds up what an engine allocates. \pre options that decoders run by
  static decode_memory bytes(const model_shape& target, const model_shape& draft, const decode_options& options,
                             const decode_sizes& sizes, const guide_needs& needs, bool /*guided*/) {
    decode_memory memory;
    memory.logits += round_batch::bytes(sizes, target.vocab);
    verifier<T, Target, cpu>::count_bytes(target, options, sizes, needs, memory);
    if (options.draft_length > 0)
      drafter<T, Draft, cpu>::count_bytes(draft, options, sizes, needs.draft_weights, memory);
    return memory;
  }

  kv_cache<T, cpu>& target_cache() { return verifier_.cache(); }
  const kv_cache<T, cpu>& target_cache() const { return verifier_.cache(); }
  kv_cache<T, cpu>* draft_cache() { return drafter_ ? &drafter_->cache() : nullptr; }
  const kv_cache<T, cpu>* draft_cache() const { return drafter_ ? &drafter_->cache() : nullptr; }

  void prefill(std::span<const prefill_part> parts) { verifier_.prefill(parts); }
  void prefill_draft(std::span<const prefill_part> parts) { drafter_->prefill(parts); }
  void forget(std::int32_t row) { (*guide_).forget(row); }

  void run(const round_plan& plan, const sequence_table& sequences) {
    trace_ = {};
    double mark = now();
    batch_.begin(plan);
    if (drafter_) drafter_->run(batch_, sequences, plan.listed, plan.reuse);
    if (drafter_) note_draft_failure(drafter_->take_failure());
    if (!batch_.forced.empty() && batch_.any_failed()) std::rethrow_exception(failure_);
    trace_.draft_seconds = lap(mark);
    reuse_ = plan.reuse;
    verifier_.lay_out(plan, batch_, sequences);
    verifier_.choose_rows(guide_, batch_, drafter_ ? &*drafter_ : nullptr, reuse_ && guide_.needs().draft_weights);
    trace_.guide_seconds = lap(mark);
    verifier_.run(guide_, batch_);
    trace_.verify_seconds = lap(mark);
    if (batch_.forced.empty())
      verifier_.judge(batch_, sequences);
    else
      verifier_.judge_forced(batch_, sequences.at(batch_.rows.data()[0]), losses_);
    trace_.accept_seconds = lap(mark);
    (*guide_).after_verify(*ctx_, verifier_.state());
    trace_.guide_seconds += lap(mark);
  }
  void settle() {
    double mark = now();
    if (drafter_) drafter_->select_own(batch_);
    trace_.draft_seconds += lap(mark);
  }

  round_result result(std::int32_t s) const {
    const auto at = static_cast<std::size_t>(s);
    const round_state<T, cpu>& state = verifier_.state();
    const std::int32_t kv_len = state.kv_lens[at], slots = verifier_.slots_of(s);
    round_result result{batch_.drafted_of(s), state.accepted[at], verifier_.next_token(s), kv_len, slots, {}};
    result.rows = rows_read(state, s, slots, guide_.metadata_rows(kv_len));
    result.rows += batch_.draft_counts.data()[s];
    result.rows.reused_rounds = reuse_ && (result.rows.dense_rounds == 0 || options_.sparse_draft) ? 1 : 0;
    result.rows.draft_failures = batch_.failed.data()[s];
    return result;
  }
  bool drafts_lost() const { return batch_.any_failed(); }
  const round_trace& trace() const { return trace_; }
  const std::exception_ptr& draft_failure() const { return failure_; }
  void note_draft_failure(const std::exception_ptr& thrown) {
    if (thrown) failure_ = thrown;
  }
  static void publish(const kv_cache<T, cpu>&) {}

  /// Rounds from here on draft and accept `text`, and leave the loss of its tokens in `losses`; empty: no longer.
  void force(std::span<const std::int32_t> text, std::span<float> losses) {
    batch_.forced = text;
    losses_ = losses;
  }

 private:
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  static double lap(double& mark) {
    const double before = mark;
    mark = now();
    return mark - before;
  }

  context<cpu>* ctx_;
  held_guide<Guide> guide_;
  decode_options options_;
  verifier<T, Target, cpu> verifier_;
  std::optional<drafter<T, Draft, cpu>> drafter_;
  round_batch batch_;
  bool reuse_ = false;  // this round reads what one before has selected
  std::span<float> losses_;
  round_trace trace_;
  std::exception_ptr failure_;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
