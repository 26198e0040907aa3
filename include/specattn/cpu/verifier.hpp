// The target's half of a round: prefill, what it reads, its pass, and the judgement of what was drafted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "../attention_pass.hpp"
#include "../decode_options.hpp"
#include "../decode_state.hpp"
#include "../guide.hpp"
#include "../kv_cache.hpp"
#include "../model.hpp"
#include "../select.hpp"
#include "../sequence_table.hpp"
#include "../verify.hpp"
#include "kept_lists.hpp"
#include "prefill.hpp"
#include "round_batch.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Used by decoder. Nothing of a sequence changes here but its row of the cache.
template <storage T, class Target, backend B>
class verifier {
 public:
  verifier(context<B>& ctx, Target& target, const decode_options& options, const decode_sizes& sizes,
           const guide_needs& needs)
      : ctx_(&ctx),
        target_(&target),
        options_(options),
        shape_(target.shape()),
        sizes_(sizes),
        needs_(needs),
        cache_(sizes.target_cache),
        pass_(sizes.sequences, most_slots(options, sizes)),
        lists_(shape_, sizes.sequences, sizes.positions) {
    arrays(shape_, sizes, needs, [this](auto, auto array, std::size_t count) { allocate(*this, array, count); });
  }

  /// Adds up what a verifier allocates.
  static void count_bytes(const model_shape& target, const decode_options& options, const decode_sizes& sizes,
                          const guide_needs& needs, decode_memory& memory) {
    memory.logits += pass_arrays::bytes(sizes.sequences, most_slots(options, sizes));
    memory.target_cache += kv_cache<T, B>::bytes(sizes.target_cache);
    memory.selections += kept_lists::bytes(target, sizes.sequences, sizes.positions);
    arrays(target, sizes, needs,
           [&](auto kind, auto array, std::size_t count) { memory.*kind += count * element_bytes(array); });
  }

  /// Of rounds, and of prefill passes.
  std::size_t workspace_bytes(const context<B>& ctx) const {
    return (std::max)(attend_workspace_bytes(ctx, {sizes_.sequences, most_slots(options_, sizes_), shape_.q_heads,
                                                   shape_.kv_heads, shape_.head_dim, sizes_.positions}),
                      verify_workspace_bytes(ctx, sizes_.judged, shape_.vocab));
  }

  kv_cache<T, B>& cache() { return cache_; }
  const kv_cache<T, B>& cache() const { return cache_; }
  const round_state<T, B>& state() const { return state_; }
  round_state<T, B>& state() { return state_; }
  std::int32_t next_token(std::int32_t s) const { return next_.data()[s]; }

  /// Caches texts, in one pass.
  void prefill(std::span<const prefill_part> parts) {
    prefill_parts(*ctx_, *target_, cache_, pass_, parts, view<float, 2, B>(logits_.data(), {0, shape_.vocab}));
  }

  /// A sequence's slots: positions to rewrite (when it is refreshed), its last token, its drafted tokens.
  void lay_out(const round_plan& plan, const round_batch& batch, const sequence_table& sequences) {
    pass_.clear();
    for (std::int32_t s = 0; s < batch.size; ++s) {
      const planned_row& planned = plan.rows[static_cast<std::size_t>(s)];
      const sequence_state& seq = sequences.at(planned.row);
      const auto length = static_cast<std::int32_t>(seq.text.size());
      if (planned.refresh) cache_.roll_back(planned.row, seq.exact_length);
      const std::int32_t kv_len = cache_.length(planned.row);
      replayed_.data()[s] = length - 1 - kv_len;
      dense_.data()[s] = planned.dense || !plan.sparse || (needs_.draft_weights && batch.failed.data()[s] != 0);
      pass_.begin_sequence(kv_len);
      for (std::int32_t i = kv_len; i < length; ++i) {
        pass_.add_slot(seq.text[static_cast<std::size_t>(i)], i, i == length - 1);
      }
      for (std::int32_t i = 0; i < batch.draft_length(s); ++i) {
        pass_.add_slot(batch.drafted.data()[batch.first_drafted(s) + i], length + i, true);
      }
      pass_.end_sequence();
    }
  }

  /// The guide's selection, or the last one and the positions since; everything where that is asked for.
  /// \param reuse the round reads what one before has selected
  template <class Guide, class Drafter>
  void choose_rows(Guide& guide, const round_batch& batch, const Drafter* drafter, bool reuse) {
    see_round(batch, drafter);
    for (std::int32_t s = 0; reuse && s < batch.size; ++s) lists_.grow(s, batch.size, pass_.kv_lens.data()[s]);
    if (!reuse) (*guide).before_verify(*ctx_, state_);
    for (std::int32_t layer = 0; layer < shape_.layers; ++layer) {
      for (std::int32_t s = 0; s < batch.size; ++s) {
        if (layer < options_.dense_layers || dense_.data()[s] != 0) state_.keep_everything(layer, s);
      }
    }
    if (!reuse) lists_.note(state_.kv_lens);
  }

  template <class Guide>
  void run(Guide& guide, const round_batch& batch) {
    attention_pass<T, B> pass(*ctx_, cache_, layout(batch));
    pass.guide_by(state_.kept);
    if (!weights_.empty()) {
      pass.record({weights_.data(), state_.target_weights.extents()}, record_slots::all);
    }
    struct hooked {
      verifier* self;
      Guide* guide;
    } object{this, &guide};
    pass.before_each_layer({&object, [](void* erased, std::int32_t layer, view<const float, 3, B> q) {
                              const auto& hook = *static_cast<hooked*>(erased);
                              (**hook.guide).before_layer(*hook.self->ctx_, hook.self->state_, layer, q);
                            }});
    for (std::int32_t s = 0; s < batch.size; ++s) cache_.reserve(batch.rows.data()[s], slots_of(s));
    target_->forward(*ctx_, pass_.batch(), pass, view<float, 2, B>(logits_.data(), {pass_.rows, shape_.vocab}));
    for (std::int32_t s = 0; s < batch.size; ++s) cache_.advance(batch.rows.data()[s], slots_of(s));
  }

  /// Accepts or rejects what was drafted.
  void judge(const round_batch& batch, const sequence_table& sequences) {
    for (std::int32_t s = 0; s < batch.size; ++s) {
      samplers_.data()[s] = sequences.at(batch.rows.data()[s]).sampler;
      positions_.data()[s] = static_cast<std::int64_t>(sequences.at(batch.rows.data()[s]).text.size());
    }
    const std::int32_t judged = batch.judged_offsets.data()[batch.size];
    verify_args<B> args;
    args.target_logits = logits_.shaped({judged, shape_.vocab});
    args.draft_probabilities = view<float, 2, B>(batch.probabilities.data(), {judged - batch.size, shape_.vocab});
    args.drafted = batch.drafted.shaped({judged - batch.size});
    args.slot_offsets = batch.judged_offsets.shaped({batch.size + 1});
    args.samplers = samplers_.shaped({batch.size});
    args.positions = positions_.shaped({batch.size});
    args.accepted = accepted_.shaped({batch.size});
    args.next_token = next_.shaped({batch.size});
    verify(*ctx_, args);
    for (std::int32_t s = 0; s < batch.size; ++s) {
      if (next_.data()[s] == no_token) accepted_.data()[s] = -1;
    }
  }

  /// score(): every draft is accepted, the text goes on, and the losses are noted.
  void judge_forced(const round_batch& batch, const sequence_state& seq, std::span<float> losses) {
    const std::size_t length = seq.text.size();
    const std::int32_t drafted = batch.draft_length(0);
    for (std::int32_t i = 0; i <= drafted; ++i) {
      const std::size_t position = length + static_cast<std::size_t>(i);
      float& loss = losses[position - static_cast<std::size_t>(seq.prompt_length)];
      loss = token_loss(logits_.data() + std::ptrdiff_t{i} * shape_.vocab, shape_.vocab, batch.forced[position]);
      expects(!std::isnan(loss), "decode: the target's logits for position ", position,
              " of the text hold no finite value");
    }
    accepted_.data()[0] = drafted;
    next_.data()[0] = batch.forced[length + static_cast<std::size_t>(drafted)];
  }

  std::int32_t slots_of(std::int32_t s) const {
    return pass_.slot_offsets.data()[s + 1] - pass_.slot_offsets.data()[s];
  }

 private:
  /// visit(kind, array, count): every array, what it is counted as, and its elements.
  template <class Visit>
  static void arrays(const model_shape& target, const decode_sizes& sizes, const guide_needs& needs, Visit&& visit) {
    const auto count = static_cast<std::size_t>(sizes.sequences);
    constexpr auto logits = &decode_memory::logits;
    if (needs.target_weights) visit(&decode_memory::recordings, &verifier::weights_, sizes.target_weights);
    visit(logits, &verifier::logits_,
          static_cast<std::size_t>(sizes.judged) * static_cast<std::size_t>(target.vocab));
    visit(logits, &verifier::replayed_, count);
    visit(logits, &verifier::accepted_, count);
    visit(logits, &verifier::next_, count);
    visit(logits, &verifier::dense_, count);
    visit(logits, &verifier::positions_, count);
    visit(logits, &verifier::samplers_, count);
  }

  static std::int32_t most_slots(const decode_options& options, const decode_sizes& sizes) {
    return (std::max)(sizes.verify_slots, options.prefill_chunk);
  }
  pass_layout<B> layout(const round_batch& batch) const { return pass_.layout(batch.rows.data()); }

  /// The round as the guide sees it.
  /// \param drafter null: there is none
  template <class Drafter>
  void see_round(const round_batch& batch, const Drafter* drafter) {
    const auto n = static_cast<std::size_t>(batch.size);
    state_ = {};
    state_.target_cache = &cache_;
    state_.cache_rows = {batch.rows.data(), n};
    state_.kv_lens = {pass_.kv_lens.data(), n};
    state_.slot_offsets = {pass_.slot_offsets.data(), n + 1};
    state_.dense = {dense_.data(), n};
    state_.replayed = {replayed_.data(), n};
    state_.accepted = {accepted_.data(), n};
    state_.layers = shape_.layers;
    state_.kv_heads = shape_.kv_heads;
    state_.kept = lists_.of(batch.size);
    std::fill_n(&state_.kept.counts[0], state_.kept.groups(), 0);
    if (drafter != nullptr) {
      state_.draft_weights = drafter->weights(batch.size);
      state_.draft_masses = drafter->masses(batch.size);
      state_.draft_steps = drafter->recorded(batch.size);
    }
    if (!weights_.empty()) {
      state_.target_weights =
          view<const float, 4, B>(weights_.data(), {shape_.layers, pass_.slots, shape_.q_heads, sizes_.positions});
    }
  }

  context<B>* ctx_;
  Target* target_;
  decode_options options_;
  model_shape shape_;
  decode_sizes sizes_;
  guide_needs needs_;
  kv_cache<T, B> cache_;
  pass_arrays pass_;
  kept_lists lists_;
  round_state<T, B> state_;
  buffer<float, B> weights_, logits_;
  buffer<std::int32_t, B> replayed_, accepted_, next_;  // [sequences] in batch order
  buffer<std::uint8_t, B> dense_;
  buffer<std::int64_t, B> positions_;
  buffer<sampler_options, B> samplers_;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
