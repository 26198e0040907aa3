// The draft's half of a round on the device: queued as a whole, captured with the rest of the round.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../../attention_pass.hpp"
#include "../../decode_options.hpp"
#include "../../decode_state.hpp"
#include "../../kv_cache.hpp"
#include "../../model.hpp"
#include "../../query_memory.hpp"
#include "../attend.cuh"
#include "../kv_cache.cuh"
#include "../recompute.cuh"
#include "../select.cuh"
#include "../verify.cuh"
#include "layout.cuh"
#include "record.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Used by decoder. A sequence that has drafted enough has no slots in the steps after.
template <storage T, class Draft>
class device_drafter {
 public:
  device_drafter(Draft& draft, const decode_options& options, const decode_sizes& sizes, bool record)
      : draft_(&draft),
        options_(options),
        shape_(draft.shape()),
        steps_(sizes.steps),
        rows_(sizes.recorded_rows),
        capacity_(sizes.recording_capacity),
        positions_(sizes.positions),
        cache_(sizes.draft_cache),
        record_(record || options.sparse_draft) {
    arrays(shape_, options, sizes, record,
           [this](auto, auto array, std::size_t count) { allocate(*this, array, count); });
    if (record_) queries_ = query_memory<cuda>(shape_, sizes);
    if (options.sparse_draft) kept_ = selection<cuda>(sizes.draft_groups, positions_);
  }

  /// Adds up what a drafter allocates.
  static void count_bytes(const model_shape& draft, const decode_options& options, const decode_sizes& sizes,
                          bool record, decode_memory& memory) {
    memory.draft_cache += kv_cache<T, cuda>::bytes(sizes.draft_cache);
    arrays(draft, options, sizes, record,
           [&](auto kind, auto array, std::size_t count) { memory.*kind += count * element_bytes(array); });
    if (record || options.sparse_draft) memory.recordings += query_memory<cuda>::bytes(draft, sizes);
    if (options.sparse_draft) memory.selections += selection<cuda>::bytes(sizes.draft_groups, sizes.positions);
  }

  std::size_t workspace_bytes(const context<cuda>& ctx, std::int32_t sequences) const {
    const std::int32_t slots = (std::max)(options_.prefill_chunk, 2 * sequences);
    std::size_t need = (std::max)(
        attend_workspace_bytes(ctx, {sequences, slots, shape_.q_heads, shape_.kv_heads, shape_.head_dim, positions_}),
        verify_workspace_bytes(ctx, sequences, shape_.vocab));
    if (record_)
      need = (std::max)(need, recompute_steps_workspace_bytes(ctx, rows_ * heads() * sequences, positions_));
    if (options_.sparse_draft) {
      need = (std::max)(need, select_workspace_bytes(ctx, std::ptrdiff_t{shape_.layers} * sequences * shape_.kv_heads,
                                                     own_rows(), positions_, own_rule()));
    }
    return need;
  }

  Draft& model() { return *draft_; }
  kv_cache<T, cuda>& cache() { return cache_; }
  const kv_cache<T, cuda>& cache() const { return cache_; }
  const model_shape& shape() const { return shape_; }
  /// Whether rounds that do not reuse lists read the draft's keys once more.
  bool records() const { return record_; }

  /// Queues a round's draft steps, and the recording of what they asked.
  /// \param max_kv_len    no text of this round, or of its graph's replays, is longer
  /// \param probabilities [sequences, drafts, vocab] what tokens are drawn from; empty: all are greedy
  void queue(context<cuda>& ctx, const round_arrays& round, std::int32_t max_kv_len,
             view<float, 3, cuda> probabilities) {
    for (std::int32_t step = 0; step < round.steps; ++step) {
      start_kernel(ctx, draft_step_kernel, dim3(1), layout_threads, draft_step_launch{round, step}, "decode");
      if (is_sparse(round)) grow_lists(ctx, round);
      attend_in(ctx, round, step);
      if (step < round.drafts && round.forced == nullptr) draw(ctx, round, step, probabilities);
    }
    if (!record_ || round.reuse) return;
    record(ctx, round, max_kv_len);
    if (options_.sparse_draft) select_own(ctx, round, max_kv_len);
  }

  /// [recorded steps, layers, sequences, q_heads, capacity] of a round; of a sparse draft's steps the mean.
  view<const fp16, 5, cuda> weights(const round_arrays& round) const {
    if (!record_) return {};
    return view<const fp16, 5, cuda>(weights_.data(),
                                     {recorded(round), shape_.layers, round.sequences, shape_.q_heads, capacity_});
  }
  view<const float, 4, cuda> masses(const round_arrays& round) const {
    if (!record_) return {};
    return view<const float, 4, cuda>(masses_.data(),
                                      {recorded(round), shape_.layers, round.sequences, shape_.q_heads});
  }
  /// [layers, sequences, kv_heads] positions that lists of a round's steps left out; null where they were dense.
  const std::int32_t* left_out(const round_arrays& round) const {
    return is_sparse(round) ? left_out_.data() : nullptr;
  }

 private:
  /// visit(kind, array, count): every array, what it is counted as, and its elements.
  template <class Visit>
  static void arrays(const model_shape& draft, const decode_options& options, const decode_sizes& sizes, bool record,
                     Visit&& visit) {
    const auto sequences = static_cast<std::size_t>(sizes.sequences);
    const auto heads = static_cast<std::size_t>(draft.layers) * static_cast<std::size_t>(draft.q_heads);
    const auto groups = static_cast<std::size_t>(sizes.draft_groups);
    visit(&decode_memory::logits, &device_drafter::logits_, sequences * static_cast<std::size_t>(draft.vocab));
    if (!record && !options.sparse_draft) return;
    visit(&decode_memory::recordings, &device_drafter::weights_, sizes.draft_weights);
    visit(&decode_memory::recordings, &device_drafter::masses_,
          sequences * static_cast<std::size_t>(sizes.recorded_rows) * heads);
    if (!options.sparse_draft) return;
    visit(&decode_memory::selections, &device_drafter::selected_, groups);
    visit(&decode_memory::selections, &device_drafter::lengths_, groups);
    visit(&decode_memory::selections, &device_drafter::left_out_, groups);
    if (options.draft_rule.rows == combine::mean)
      visit(&decode_memory::recordings, &device_drafter::sums_,
            groups * static_cast<std::size_t>(sizes.recording_capacity));
  }

  bool is_sparse(const round_arrays& round) const { return options_.sparse_draft && round.listed; }
  selection_view<cuda> lists(const round_arrays& round) const {
    return kept_.view().slice(0, std::ptrdiff_t{shape_.layers} * round.sequences * shape_.kv_heads);
  }
  std::int32_t heads() const { return shape_.layers * shape_.q_heads; }
  std::int32_t group_heads() const { return shape_.q_heads / shape_.kv_heads; }
  /// A sparse draft's lists are selected from one row a group where the rule averages the heads'.
  std::int32_t own_rows() const { return options_.draft_rule.rows == combine::mean ? 1 : group_heads(); }
  selection_rule own_rule() const {
    selection_rule rule = options_.draft_rule;
    if (rule.rows == combine::mean) rule.rows = combine::unite;
    return rule;
  }
  std::int32_t recorded(const round_arrays& round) const { return (std::min)(rows_, round.steps); }
  std::ptrdiff_t step_rows(const round_arrays& round) const { return std::ptrdiff_t{heads()} * round.sequences; }

  void attend_in(context<cuda>& ctx, const round_arrays& round, std::int32_t step) {
    attention_pass<T, cuda> pass(ctx, cache_, draft_layout(round));
    if (record_ && step < steps_ && !round.reuse) pass.keep_queries(queries_.log(step, round.sequences));
    if (is_sparse(round)) pass.guide_by(lists(round));
    const forward_batch<cuda> slots = draft_slots(round, step);
    draft_->forward(ctx, slots, pass, logits_.shaped({slots.logit_rows.extent(0), shape_.vocab}));
  }

  void draw(context<cuda>& ctx, const round_arrays& round, std::int32_t step, view<float, 3, cuda> probabilities) {
    const std::ptrdiff_t n = round.sequences, vocab = shape_.vocab;
    view<float, 2, cuda> drawn_from;
    if (!probabilities.empty())
      drawn_from = {probabilities.data() + step * vocab, {n, vocab}, {round.drafts * vocab, 1}};
    sample<cuda>(ctx, logits_.shaped({n, vocab}), {round.samplers, {n}}, {round.drawn_at, {n}}, random_use::draft,
                 drawn_from, {round.drafted + step, {n}, {round.drafts}});
  }

  void record(context<cuda>& ctx, const round_arrays& round, std::int32_t max_kv_len) {
    const std::ptrdiff_t n = round.sequences, q_heads = shape_.q_heads;
    recompute_steps_args<T, cuda> args = queries_.asked((std::min)(steps_, round.steps), round.sequences, cache_);
    args.slot_of = {round.asking, {args.q.extent(0), n}};
    args.kv_lens = {round.weighed_lens, {n}};
    args.cache_rows = {round.cache_rows, {n}};
    args.weights = {weights_.data(),
                    {recorded(round), shape_.layers, n, q_heads, max_kv_len},
                    {step_rows(round) * capacity_, n * q_heads * capacity_, q_heads * capacity_, capacity_, 1}};
    args.masses = {masses_.data(), {recorded(round), shape_.layers, n, q_heads}};
    recompute_steps(ctx, args);
  }

  /// What the next rounds' steps read, from this round's weights.
  void select_own(context<cuda>& ctx, const round_arrays& round, std::int32_t max_kv_len) {
    const std::ptrdiff_t groups = std::ptrdiff_t{shape_.layers} * round.sequences * shape_.kv_heads;
    const own_lengths_launch lengths{round, lengths_.data(), static_cast<std::int32_t>(groups), shape_.kv_heads};
    start_kernel(ctx, own_lengths_kernel, dim3(blocks_of(groups, record_threads)), record_threads, lengths, "decode");
    const fp16* rows = weights_.data();
    if (own_rows() == 1) {
      const add_heads_launch launch{round,     rows,          masses_.data(), sums_.data(),
                                    capacity_, group_heads(), shape_.kv_heads};
      const dim3 grid(blocks_of(max_kv_len, add_heads_positions * record_threads), static_cast<unsigned>(groups));
      start_kernel(ctx, add_heads_kernel, grid, record_threads, launch, "decode");
      rows = sums_.data();
    }
    weight_rows<fp16, cuda> from;
    from.weights = {rows, {groups, own_rows(), max_kv_len}, {own_rows() * capacity_, capacity_, 1}};
    from.kv_lens = lengths_.shaped({groups});
    selection_view<cuda> selected = lists(round);
    select(ctx, from, own_rule(), selected);
    check_cuda(cudaMemcpyAsync(selected_.data(), selected.counts.data(),
                               static_cast<std::size_t>(groups) * sizeof(std::int32_t), cudaMemcpyDeviceToDevice,
                               ctx.stream()),
               "decode");
  }

  void grow_lists(context<cuda>& ctx, const round_arrays& round) {
    const step_lists_launch launch{round,           lists(round),     selected_.data(),
                                   lengths_.data(), left_out_.data(), shape_.kv_heads};
    start_kernel(ctx, step_lists_kernel, dim3(blocks_of(launch.kept.groups(), record_threads / 32)), record_threads,
                 launch, "decode");
  }

  Draft* draft_;
  decode_options options_;
  model_shape shape_;
  std::int32_t steps_;  // that are recorded
  std::int32_t rows_;   // sets of weights they leave
  std::ptrdiff_t capacity_;
  std::int32_t positions_;
  kv_cache<T, cuda> cache_;
  bool record_;
  query_memory<cuda> queries_;
  buffer<fp16, cuda> weights_;  // [steps, layers, sequences, q_heads, capacity]
  buffer<float, cuda> masses_;  // [steps, layers, sequences, q_heads]
  selection<cuda> kept_;
  buffer<std::int32_t, cuda> selected_;  // counts of kept_ when it was selected
  buffer<std::int32_t, cuda> lengths_;   // and what it was selected from
  buffer<std::int32_t, cuda> left_out_;  // of a round's steps
  buffer<fp16, cuda> sums_;              // [groups, capacity] where a list is selected from a mean of heads
  buffer<float, cuda> logits_;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
