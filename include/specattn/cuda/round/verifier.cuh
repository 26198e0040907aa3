// The target's half of a round on the device: what it reads, its pass, and the judgement of what was drafted.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../../attention_pass.hpp"
#include "../../decode_options.hpp"
#include "../../decode_state.hpp"
#include "../../guide.hpp"
#include "../../kv_cache.hpp"
#include "../../model.hpp"
#include "../../selection.hpp"
#include "../attend.cuh"
#include "../kv_cache.cuh"
#include "../verify.cuh"
#include "exchange.cuh"
#include "forced.cuh"
#include "layout.cuh"
#include "record.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Used by decoder. All work is queued, and captured with the rest of the round.
template <storage T, class Target>
class device_verifier {
 public:
  /// \param guided the target may read a selection
  device_verifier(Target& target, const decode_options& options, const decode_sizes& sizes, const guide_needs& needs,
                  bool guided)
      : target_(&target),
        shape_(target.shape()),
        dense_layers_(options.dense_layers),
        capacity_(sizes.recording_capacity),
        cache_(sizes.target_cache) {
    arrays(shape_, options, sizes, needs, guided,
           [this](auto, auto array, std::size_t count) { allocate(*this, array, count); });
    if (guided) kept_ = selection<cuda>(sizes.target_groups, sizes.positions);
  }

  /// Adds up what a verifier allocates.
  static void count_bytes(const model_shape& target, const decode_options& options, const decode_sizes& sizes,
                          const guide_needs& needs, bool guided, decode_memory& memory) {
    memory.target_cache += kv_cache<T, cuda>::bytes(sizes.target_cache);
    if (guided) memory.selections += selection<cuda>::bytes(sizes.target_groups, sizes.positions);
    arrays(target, options, sizes, needs, guided,
           [&](auto kind, auto array, std::size_t count) { memory.*kind += count * element_bytes(array); });
  }

  /// Of rounds, and of prefill passes of \p prefill_chunk slots.
  std::size_t workspace_bytes(const context<cuda>& ctx, const decode_sizes& sizes, std::int32_t prefill_chunk) const {
    const std::int32_t slots = (std::max)(sizes.verify_slots, prefill_chunk);
    const attend_shape pass{sizes.sequences, slots,           shape_.q_heads,
                            shape_.kv_heads, shape_.head_dim, sizes.positions};
    return (std::max)(attend_workspace_bytes(ctx, pass), verify_workspace_bytes(ctx, sizes.judged, shape_.vocab));
  }

  Target& model() { return *target_; }
  kv_cache<T, cuda>& cache() { return cache_; }
  const kv_cache<T, cuda>& cache() const { return cache_; }
  view<float, 2, cuda> logits(std::int32_t rows) { return logits_.shaped({rows, shape_.vocab}); }
  /// [sequences, drafts, vocab] what a round's tokens are drawn from.
  view<float, 3, cuda> probabilities(const round_arrays& round) {
    return {probabilities_.data(), {round.sequences, round.drafts, shape_.vocab}};
  }

  /// What the guide is told of a round.
  /// \param drafter may be null
  template <class Drafter>
  round_state<T, cuda> state(const round_arrays& round, const round_key& key, const Drafter* drafter) const {
    const std::int32_t n = round.sequences;
    round_state<T, cuda> state;
    state.cache_rows = key.rows;
    state.max_kv_len = key.max_len;
    state.slot_offsets = {round.offsets, {n + 1}};
    state.rows = {round.cache_rows, {n}};
    state.kv_lens = {round.prefix_lens, {n}};
    state.fresh = {round.fresh, {n}};
    state.accepted = {round.accepted, {n}};
    state.layers = shape_.layers;
    state.kv_heads = shape_.kv_heads;
    if (!key.sparse) return state;
    if (drafter != nullptr) {
      state.draft_weights = drafter->weights(round);
      state.draft_masses = drafter->masses(round);
      state.draft_steps = {round.steps_of, {n}};
    }
    if (!weights_.empty()) {
      state.target_weights = view<const float, 4, cuda>(
          weights_.data(), {shape_.layers, n * round.most_slots(), shape_.q_heads, capacity_});
    }
    state.kept = kept_.view().slice(0, std::ptrdiff_t{shape_.layers} * n * shape_.kv_heads);
    return state;
  }

  /// The round's lists, for the kernels that complete and report them.
  template <class Drafter>
  kept_launch lists(const round_arrays& round, const round_state<T, cuda>& state, const Drafter* drafter) const {
    kept_launch lists{.round = round,
                      .kept = state.kept,
                      .selected = selected_.data(),
                      .own_left_out = nullptr,
                      .layers = shape_.layers,
                      .kv_heads = shape_.kv_heads,
                      .dense_layers = dense_layers_,
                      .own_layers = 0,
                      .own_kv_heads = 0};
    if (drafter == nullptr) return lists;
    lists.own_left_out = drafter->left_out(round);
    lists.own_layers = drafter->shape().layers;
    lists.own_kv_heads = drafter->shape().kv_heads;
    return lists;
  }

  template <class Guide>
  void choose_rows(context<cuda>& ctx, Guide& guide, round_state<T, cuda>& state, const kept_launch& lists) {
    if (!lists.round.reuse) (*guide).before_verify(ctx, state);
    const dim3 grid(blocks_of(state.kept.groups(), record_threads / 32));
    start_kernel(ctx, settle_lists_kernel, grid, record_threads, lists, "decode");
  }

  void run(context<cuda>& ctx, const round_arrays& round, const round_state<T, cuda>& state, bool sparse) {
    attention_pass<T, cuda> pass(ctx, cache_, verify_layout(round));
    if (sparse) pass.guide_by(state.kept);
    if (!state.target_weights.empty())
      pass.record({weights_.data(), state.target_weights.extents()}, record_slots::all);
    target_->forward(ctx, verify_slots(round), pass,
                     logits_.shaped({round.sequences * round.most_slots(), shape_.vocab}));
  }

  /// \param probabilities as probabilities(); empty: all sequences are greedy
  void judge(context<cuda>& ctx, const round_arrays& round, view<float, 3, cuda> probabilities) {
    const std::int32_t n = round.sequences, drafted = n * round.drafts;
    verify_args<cuda> args;
    args.target_logits = logits_.shaped({n * round.most_slots(), shape_.vocab});
    if (!probabilities.empty())
      args.draft_probabilities = view<float, 2, cuda>(probabilities.data(), {drafted, shape_.vocab});
    args.drafted = {round.drafted, {drafted}};
    args.slot_offsets = {round.judged_offsets, {n + 1}};
    args.samplers = {round.samplers, {n}};
    args.positions = {round.text_lens, {n}};
    args.accepted = {round.accepted, {n}};
    args.next_token = {round.next, {n}};
    verify(ctx, args);
  }

  /// Accepts what was forced, and notes its losses.
  void judge_forced(context<cuda>& ctx, const round_arrays& round) {
    const std::int32_t rows = round.sequences * round.most_slots();
    const forced_launch launch{round, logits_.shaped({rows, shape_.vocab})};
    start_kernel(ctx, judge_forced_kernel, dim3(static_cast<unsigned>(rows)), forced_threads, launch, "decode");
  }

 private:
  /// visit(kind, array, count): every array, what it is counted as, and its elements.
  template <class Visit>
  static void arrays(const model_shape& target, const decode_options& options, const decode_sizes& sizes,
                     const guide_needs& needs, bool guided, Visit&& visit) {
    const auto vocab = static_cast<std::size_t>(target.vocab);
    const auto drafted = static_cast<std::size_t>(sizes.sequences) * static_cast<std::size_t>(options.draft_length);
    visit(&decode_memory::logits, &device_verifier::logits_, static_cast<std::size_t>(sizes.judged) * vocab);
    visit(&decode_memory::logits, &device_verifier::probabilities_, drafted * vocab);
    if (guided)
      visit(&decode_memory::selections, &device_verifier::selected_, static_cast<std::size_t>(sizes.target_groups));
    if (needs.target_weights) visit(&decode_memory::recordings, &device_verifier::weights_, sizes.target_weights);
  }

  Target* target_;
  model_shape shape_;
  std::int32_t dense_layers_;
  std::ptrdiff_t capacity_;  // of a recorded row
  kv_cache<T, cuda> cache_;
  selection<cuda> kept_;
  buffer<std::int32_t, cuda> selected_;  // counts of kept_ when it was selected
  buffer<float, cuda> weights_, logits_, probabilities_;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
