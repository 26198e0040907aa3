// The draft's half of a round: propose tokens, record attention weights, keep the draft's cache in step.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <utility>

#include "../attention_pass.hpp"
#include "../decode_options.hpp"
#include "../decode_state.hpp"
#include "../kv_cache.hpp"
#include "../model.hpp"
#include "../query_memory.hpp"
#include "../select.hpp"
#include "../sequence_table.hpp"
#include "../verify.hpp"
#include "kept_lists.hpp"
#include "prefill.hpp"
#include "round_batch.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Used by decoder. Every sequence of the batch stays in every draft step, without slots once it has drafted enough,
/// so that recorded rows keep their place.
template <storage T, class Draft, backend B>
class drafter {
 public:
  drafter(context<B>& ctx, Draft& draft, const decode_options& options, const decode_sizes& sizes, bool record)
      : ctx_(&ctx),
        draft_(&draft),
        options_(options),
        shape_(draft.shape()),
        steps_(sizes.steps),
        rows_(sizes.recorded_rows),
        capacity_(sizes.positions),
        cache_(sizes.draft_cache),
        record_(record || options.sparse_draft),
        pass_(sizes.sequences, most_slots(options, sizes)) {
    arrays(shape_, options, sizes, record,
           [this](auto, auto array, std::size_t count) { allocate(*this, array, count); });
    if (!options.sparse_draft) return;
    queries_ = query_memory<B>(shape_, sizes);
    lists_ = kept_lists(shape_, sizes.sequences, capacity_);
  }

  /// Adds up what a drafter allocates.
  static void count_bytes(const model_shape& draft, const decode_options& options, const decode_sizes& sizes,
                          bool record, decode_memory& memory) {
    memory.draft_cache += kv_cache<T, B>::bytes(sizes.draft_cache);
    memory.logits += pass_arrays::bytes(sizes.sequences, most_slots(options, sizes));
    arrays(draft, options, sizes, record,
           [&](auto kind, auto array, std::size_t count) { memory.*kind += count * element_bytes(array); });
    if (!options.sparse_draft) return;
    memory.recordings += query_memory<B>::bytes(draft, sizes);
    memory.selections += kept_lists::bytes(draft, sizes.sequences, sizes.positions);
  }

  std::size_t workspace_bytes(const context<B>& ctx, std::int32_t sequences) const {
    const std::int32_t slots = (std::max)(options_.prefill_chunk, 2 * sequences);
    std::size_t need =
        attend_workspace_bytes(ctx, {sequences, slots, shape_.q_heads, shape_.kv_heads, shape_.head_dim, capacity_});
    if (options_.sparse_draft) {
      const std::ptrdiff_t groups = std::ptrdiff_t{shape_.layers} * sequences * shape_.kv_heads;
      const std::ptrdiff_t heads = shape_.q_heads / shape_.kv_heads;
      need = (std::max)({need, select_workspace_bytes(ctx, groups, heads, capacity_, options_.draft_rule),
                         recompute_steps_workspace_bytes(ctx, groups * heads, capacity_)});
    }
    return need;
  }

  kv_cache<T, B>& cache() { return cache_; }
  const kv_cache<T, B>& cache() const { return cache_; }

  /// Caches texts, in one pass.
  void prefill(std::span<const prefill_part> parts) {
    prefill_parts(*ctx_, *draft_, cache_, pass_, parts, view<float, 2, B>(logits_.data(), {0, shape_.vocab}));
  }

  /// Drafts for the whole batch into batch.drafted (and batch.probabilities where it samples). A draft that throws, or has
  /// nothing to draw from, loses the tokens from there on; batch.failed says whose.
  /// \param listed a sparse draft's steps read what was selected for these rows before, and all since; else they are dense
  /// \param reuse  nothing is recorded, and nothing selected anew
  void run(round_batch& batch, const sequence_table& sequences, bool listed, bool reuse) {
    sparse_ = listed && options_.sparse_draft;
    reuse_ = reuse;
    recorded_own_ = false;
    step_ = 0;
    std::fill_n(recorded_.data(), recorded_.size(), 0);
    const std::int32_t most = batch.most_steps();
    const auto thrown = attempt([&] { draft(batch, sequences, most); });
    if (thrown) {
      failure_ = thrown;
      for (std::int32_t s = 0; s < batch.size; ++s) {
        if (batch.draft_length(s) > 0) batch.drop_drafts(s, step_);
      }
    }
    if (batch.any_failed()) batch.close_gaps(shape_.vocab);
  }
  /// What the draft threw since this was last asked; null: nothing.
  std::exception_ptr take_failure() { return std::exchange(failure_, nullptr); }

  /// Once the round stands: selects what the next rounds' steps read, from this round's weights. Before, a round that is
  /// given up must find the lists it began with.
  void select_own(const round_batch& batch) {
    if (!recorded_own_) return;
    const std::ptrdiff_t groups = std::ptrdiff_t{shape_.layers} * batch.size * shape_.kv_heads;
    const std::ptrdiff_t heads = shape_.q_heads / shape_.kv_heads;
    std::int32_t longest = 1;
    for (std::int32_t s = 0; s < batch.size; ++s) {
      const std::int32_t length = recorded_lens_.data()[s];
      longest = (std::max)(longest, length);
      for (std::int32_t layer = 0; layer < shape_.layers; ++layer) {
        for (std::int32_t h = 0; h < shape_.kv_heads; ++h)
          group_lens_.data()[group(layer, s, h, batch.size)] = length;
      }
    }
    weight_rows<float, B> from;
    from.weights = {weights_.data(), {groups, heads, longest}, {heads * capacity_, capacity_, 1}};
    from.kv_lens = group_lens_.shaped({groups});
    select(*ctx_, from, options_.draft_rule, lists_.of(batch.size));
    lists_.note({recorded_lens_.data(), static_cast<std::size_t>(batch.size)});
  }

  /// [recorded steps, layers, sequences, q_heads, positions] of the last run; of a sparse draft's steps the mean.
  view<const float, 5, B> weights(std::int32_t sequences) const {
    if (!record_) return {};
    return view<const float, 5, B>(weights_.data(), {rows_, shape_.layers, sequences, shape_.q_heads, capacity_});
  }
  /// [recorded steps, layers, sequences, q_heads] what those rows sum to over the prefix.
  view<const float, 4, B> masses(std::int32_t sequences) const {
    if (!record_) return {};
    return view<const float, 4, B>(masses_.data(), {rows_, shape_.layers, sequences, shape_.q_heads});
  }
  /// [sequences] how many steps each has recorded.
  std::span<const std::int32_t> recorded(std::int32_t sequences) const {
    return {recorded_.data(), static_cast<std::size_t>(sequences)};
  }

 private:
  static std::int32_t most_slots(const decode_options& options, const decode_sizes& sizes) {
    return (std::max)(options.prefill_chunk, 2 * sizes.sequences);
  }
  /// visit(kind, array, count): every array, what it is counted as, and its elements.
  template <class Visit>
  static void arrays(const model_shape& draft, const decode_options& options, const decode_sizes& sizes, bool record,
                     Visit&& visit) {
    const auto sequences = static_cast<std::size_t>(sizes.sequences);
    const auto heads = static_cast<std::size_t>(draft.layers) * static_cast<std::size_t>(draft.q_heads);
    constexpr auto recordings = &decode_memory::recordings;
    if (record || options.sparse_draft) visit(recordings, &drafter::weights_, sizes.draft_weights);
    visit(recordings, &drafter::masses_, sequences * static_cast<std::size_t>(sizes.recorded_rows) * heads);
    visit(recordings, &drafter::group_lens_, static_cast<std::size_t>(sizes.draft_groups));
    visit(recordings, &drafter::recorded_, sequences);
    visit(&decode_memory::logits, &drafter::logits_, sequences * static_cast<std::size_t>(draft.vocab));
    if (!options.sparse_draft) return;
    visit(recordings, &drafter::slot_of_, static_cast<std::size_t>(sizes.steps) * sequences);
    visit(recordings, &drafter::recorded_lens_, sequences);
  }

  void draft(const round_batch& batch, const sequence_table& sequences, std::int32_t most) {
    for (std::int32_t s = 0; s < batch.size; ++s) {
      if (batch.draft_length(s) > 0) catch_up(batch.rows.data()[s], sequences);
    }
    for (; step_ < most; ++step_) {
      gather(step_, batch, sequences);
      forward(step_, batch);
      choose(step_, batch, sequences);
    }
    if (options_.sparse_draft && !reuse_ && batch.most_steps() > 0) record(batch, sequences);
  }

  /// Caches what a sequence decoded while it did not draft, up to the one or two tokens the first step feeds.
  void catch_up(std::int32_t row, const sequence_table& sequences) {
    const auto& text = sequences.at(row).text;
    const auto end = static_cast<std::int32_t>(text.size());
    while (end - cache_.length(row) > 2) {
      const prefill_part part{row, text, (std::min)(end - 1, cache_.length(row) + options_.prefill_chunk)};
      prefill({&part, 1});
    }
  }

  /// The first step feeds what the draft has not cached yet (one token, or two after a fully accepted round); later
  /// steps feed the token drafted before, the last one of a sequence perhaps for its attention alone.
  void gather(std::int32_t step, const round_batch& batch, const sequence_table& sequences) {
    pass_.clear();
    for (std::int32_t s = 0; s < batch.size; ++s) {
      const std::int32_t row = batch.rows.data()[s];
      const std::int32_t cached = cache_.length(row);
      const auto& text = sequences.at(row).text;
      pass_.begin_sequence(cached);
      if (batch.steps(s) > step) {
        const auto end = static_cast<std::int32_t>(text.size());
        if (step == 0) {
          for (std::int32_t i = cached; i < end; ++i) {
            pass_.add_slot(text[static_cast<std::size_t>(i)], i, i + 1 == end);
          }
        } else {
          pass_.add_slot(batch.drafted.data()[batch.first_drafted(s) + step - 1], end + step - 1,
                         batch.draft_length(s) > step);
        }
      }
      pass_.end_sequence();
    }
  }

  void forward(std::int32_t step, const round_batch& batch) {
    attention_pass<T, B> pass(*ctx_, cache_, pass_.layout(batch.rows.data()));
    const bool records = record_ && !reuse_ && step < steps_;
    for (std::int32_t s = 0; sparse_ && s < batch.size; ++s) {
      if (slots_of(s) > 0) lists_.grow(s, batch.size, pass_.kv_lens.data()[s]);
    }
    if (records && options_.sparse_draft) {
      pass.keep_queries(queries_.log(step, batch.size));
      for (std::int32_t s = 0; s < batch.size; ++s)
        slot_of_.data()[step * batch.size + s] = slots_of(s) > 0 ? pass_.slot_offsets.data()[s + 1] - 1 : -1;
    }
    if (records && !options_.sparse_draft) {
      pass.record(
          {weights_.data() + step * set_size(batch.size), {shape_.layers, batch.size, shape_.q_heads, capacity_}},
          record_slots::newest);
    }
    if (sparse_) pass.guide_by(lists_.of(batch.size));
    for (std::int32_t s = 0; s < batch.size; ++s) cache_.reserve(batch.rows.data()[s], slots_of(s));
    draft_->forward(*ctx_, pass_.batch(), pass, view<float, 2, B>(logits_.data(), {pass_.rows, shape_.vocab}));
    for (std::int32_t s = 0; s < batch.size; ++s) {
      batch.draft_counts.data()[s] += rows_of(s, batch.size);
      if (slots_of(s) > 0) ++batch.draft_counts.data()[s].draft_steps;
      cache_.advance(batch.rows.data()[s], slots_of(s));
    }
    if (records && !options_.sparse_draft) note_weights(step, batch);
  }

  std::ptrdiff_t set_size(std::int32_t sequences) const {
    return std::ptrdiff_t{shape_.layers} * sequences * shape_.q_heads * capacity_;
  }

  /// After a dense recorded step: the mass of its rows over the round's prefix.
  void note_weights(std::int32_t step, const round_batch& batch) {
    const std::ptrdiff_t heads = shape_.q_heads;
    const std::ptrdiff_t count = std::ptrdiff_t{shape_.layers} * batch.size * heads;
    ctx_->parallel_for(count, [&](std::ptrdiff_t i, int) {
      const auto s = static_cast<std::int32_t>(i / heads % batch.size);
      if (slots_of(s) == 0) return;
      const std::int32_t length = cache_.length(batch.rows.data()[s]);  // prefix and tail of this step
      masses_.data()[step * count + i] =
          prefix_mass(weights_.data() + (step * count + i) * capacity_, length - 1 - step, length);
    });
    for (std::int32_t s = 0; s < batch.size; ++s) {
      if (slots_of(s) > 0) recorded_.data()[s] = step + 1;
    }
  }

  /// After a sparse draft's steps, whether they were dense this time or not: their mean over the round's prefix.
  void record(const round_batch& batch, const sequence_table& sequences) {
    const std::int32_t n = batch.size, steps = (std::min)(steps_, batch.most_steps());
    for (std::int32_t s = 0; s < n; ++s) {
      const auto text = static_cast<std::int32_t>(sequences.at(batch.rows.data()[s]).text.size());
      recorded_.data()[s] = batch.draft_length(s) > 0 ? 1 : 0;
      recorded_lens_.data()[s] = batch.draft_length(s) > 0 ? text - 1 : 0;
      batch.draft_counts.data()[s].draft_rows_read +=  // keys alone: half of a row
          (std::int64_t{recorded_lens_.data()[s]} * shape_.layers * shape_.kv_heads + 1) / 2;
    }
    recompute_steps_args<T, B> args = queries_.asked(steps, n, cache_);
    args.slot_of = slot_of_.shaped({steps, n});
    args.kv_lens = recorded_lens_.shaped({n});
    args.cache_rows = batch.rows.shaped({n});
    args.weights = {weights_.data(), {1, shape_.layers, n, shape_.q_heads, capacity_}};
    args.masses = {masses_.data(), {1, shape_.layers, n, shape_.q_heads}};
    recompute_steps(*ctx_, args);
    make_masses_one(args);
    recorded_own_ = true;
  }

  /// Renormalises the recorded rows: those of heads whose lists kept less mass came out larger (see recompute_steps()).
  void make_masses_one(const recompute_steps_args<T, B>& recorded) const {
    const std::ptrdiff_t heads = shape_.q_heads, n = recorded.kv_lens.extent(0);
    ctx_->parallel_for(shape_.layers * n * heads, [&](std::ptrdiff_t i, int) {
      if (masses_.data()[i] <= 0.0f) return;
      float* row = weights_.data() + i * capacity_;
      const float scale = 1.0f / masses_.data()[i];
      const std::int32_t length = recorded.kv_lens[i / heads % n];
      for (std::int32_t j = 0; j < length; ++j) row[j] *= scale;
      masses_.data()[i] = 1.0f;
    });
  }

  /// A row sums to one over its prefix and tail.
  static float prefix_mass(const float* row, std::int32_t prefix, std::int32_t length) {
    float tail = 0.0f;
    for (std::int32_t i = prefix; i < length; ++i) tail += row[i];
    if (tail < 0.99f) return 1.0f - tail;
    float mass = 0.0f;  // the difference would have lost its digits
    for (std::int32_t i = 0; i < prefix; ++i) mass += row[i];
    return mass;
  }

  /// Draws (or, when scoring, looks up) the token of each sequence that drafts in this step.
  void choose(std::int32_t step, const round_batch& batch, const sequence_table& sequences) {
    std::int32_t logit_row = 0;
    for (std::int32_t s = 0; s < batch.size; ++s) {
      if (batch.draft_length(s) <= step) continue;
      const auto& seq = sequences.at(batch.rows.data()[s]);
      const auto position = static_cast<std::int64_t>(seq.text.size()) + step;
      const std::ptrdiff_t at = batch.first_drafted(s) + step;
      if (!batch.forced.empty()) {
        batch.drafted.data()[at] = batch.forced[static_cast<std::size_t>(position)];
      } else {
        sample(*ctx_,
               view<const float, 2, B>(logits_.data() + std::ptrdiff_t{logit_row} * shape_.vocab, {1, shape_.vocab}),
               view<const sampler_options, 1, B>(&seq.sampler, {1}), view<const std::int64_t, 1, B>(&position, {1}),
               random_use::draft,
               view<float, 2, B>(batch.probabilities.data() + at * shape_.vocab, {1, shape_.vocab}),
               view<std::int32_t, 1, B>(batch.drafted.data() + at, {1}));
        if (batch.drafted.data()[at] == no_token) batch.drop_drafts(s, step);
      }
      ++logit_row;
    }
  }

  std::ptrdiff_t group(std::int32_t layer, std::int32_t s, std::int32_t h, std::int32_t sequences) const {
    return (std::ptrdiff_t{layer} * sequences + s) * shape_.kv_heads + h;
  }
  std::int32_t slots_of(std::int32_t s) const {
    return pass_.slot_offsets.data()[s + 1] - pass_.slot_offsets.data()[s];
  }

  decode_counts rows_of(std::int32_t s, std::int32_t sequences) const {
    decode_counts counts;
    const std::int32_t slots = slots_of(s);
    if (slots == 0) return counts;
    const std::int64_t all = pass_.kv_lens.data()[s] + slots;
    counts.draft_rows_dense += all * shape_.layers * shape_.kv_heads;
    if (!sparse_) {
      counts.draft_rows_read += all * shape_.layers * shape_.kv_heads;
      return counts;
    }
    const selection_view<B> kept = lists_.of(sequences);
    for (std::int32_t layer = 0; layer < shape_.layers; ++layer) {
      for (std::int32_t h = 0; h < shape_.kv_heads; ++h) {
        const std::int32_t count = kept.counts[group(layer, s, h, sequences)];
        counts.draft_rows_read += (count == keep_all ? pass_.kv_lens.data()[s] : count) + slots;
      }
    }
    return counts;
  }

  context<B>* ctx_;
  Draft* draft_;
  decode_options options_;
  model_shape shape_;
  std::int32_t steps_;  // that guide a round
  std::int32_t rows_;   // sets of weights they leave
  std::int32_t capacity_;
  kv_cache<T, B> cache_;
  bool record_;
  bool sparse_ = false;        // there are lists to read
  bool reuse_ = false;         // this round records nothing
  bool recorded_own_ = false;  // this round has recorded what a sparse draft selects from
  std::int32_t step_ = 0;
  std::exception_ptr failure_;
  pass_arrays pass_;
  query_memory<B> queries_;                // of a sparse draft
  buffer<std::int32_t, B> slot_of_;        // [steps, sequences] who asked; -1: nobody
  buffer<float, B> weights_;               // [steps, layers, sequences, q_heads, positions]
  kept_lists lists_;                       // of a sparse draft
  buffer<std::int32_t, B> recorded_lens_;  // [sequences] positions that were recorded
  buffer<float, B> logits_;
  buffer<float, B> masses_;  // [recorded steps, layers, sequences, q_heads]
  buffer<std::int32_t, B> group_lens_, recorded_;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
